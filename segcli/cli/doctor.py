"""``segcli doctor``: what is wrong on this machine, and how to mend it."""

from dataclasses import asdict

import typer

from segcli.cli import options as o
from segcli.errors import ExitCode


def doctor(
    device: o.Device = "auto",
    as_json: o.Json = False,
    debug: o.Debug = False,
) -> None:
    """Check versions, providers, CUDA libraries, threads and cache, and run the embedded model.

    segcli doctor

    segcli doctor --device cuda

    Exits with 0 where all is well, else with the code that a run would end with (3 or 4).
    """
    from segcli.cli import console
    from segcli.diagnose import examine

    code = ExitCode.OK
    findings = []
    with console.results() as out:
        for finding in examine(device):
            if finding.state == "fail":
                code = code or finding.exit_code
            if as_json:
                findings.append(asdict(finding))
                continue
            out.line(f"{finding.state:4}  {finding.check}: {console.visible(finding.text)}")
            if finding.mend:
                out.line(f"      mend: {finding.mend}")
        if as_json:
            console.dump_json(out, findings)
    raise typer.Exit(code)
