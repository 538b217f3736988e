"""Which outputs exist in a store, asked while other images are worked on.

Each question is a request: one after the other they would take longer than the images that
``--skip-existing`` leaves out.
"""

from collections.abc import Iterable, Iterator
from contextlib import closing
from functools import partial

from segcli.errors import ImageError
from segcli.in_order import in_order
from segcli.inputs import Source
from segcli.storage import exists
from segcli.urls import is_url
from segcli.writers import OutputPlan

_QUESTIONS_AT_ONCE = 8


class Lookahead:
    """Answers for the outputs of the next images.

    Args:
        plan: Names the outputs.
    """

    def __init__(self, plan: OutputPlan) -> None:
        self._plan = plan
        self._answers: dict[str, bool] = {}

    def ahead(self, sources: Iterable[Source]) -> Iterator[Source]:
        """Yields the sources, in order, each when the answers for its outputs are here.

        Raises:
            OutputError: The store does not tell.
        """
        if not is_url(self._plan.output):
            yield from sources
            return

        def ask(source: Source) -> tuple[Source, dict[str, bool]]:
            try:
                targets = self._plan.targets(source)
            except ImageError:  # told when its turn comes
                return source, {}
            return source, {target: exists(target) for target in targets}

        jobs = (partial(ask, source) for source in sources)
        with closing(in_order(jobs, workers=_QUESTIONS_AT_ONCE, stopping=lambda: None)) as asked:
            for source, answers in asked:
                # Those of the last one that nobody wanted.
                self._answers = answers
                yield source

    def is_there(self, target: str) -> bool:
        """Tells whether an output of the source that came last exists."""
        answer = self._answers.get(target)
        return exists(target) if answer is None else answer
