"""A run in parts that need nothing of each other: which input belongs to which."""

import re
from dataclasses import dataclass
from hashlib import blake2b
from os import fsencode

from segcli.errors import UsageError
from segcli.formats import common_stem


@dataclass(frozen=True)
class Shard:
    """One part of a run.

    Inputs are dealt by a hash of the place that names their output, without suffixes: a file
    that comes or goes moves no other to another part, and inputs that would write one file meet in
    one part, where that is seen.

    Attributes:
        index: From 0.
        count: Of all parts.
    """

    index: int
    count: int

    def holds(self, relative: str) -> bool:
        """Tells whether an input is in this part.

        Args:
            relative: Its ``Source.relative``.
        """
        digest = blake2b(fsencode(common_stem(relative)), digest_size=8).digest()
        return int.from_bytes(digest, "big") % self.count == self.index


def parse_shard(text: str | None) -> Shard | None:
    """Returns the part that ``--shard i/N`` names, None for the whole.

    Raises:
        UsageError: It has another form, or i is not from 1 to N.
    """
    if text is None:
        return None
    match = re.fullmatch(r"([0-9]{1,9})/([0-9]{1,9})", text, re.ASCII)
    if match is None or not 1 <= int(match[1]) <= int(match[2]):
        raise UsageError(
            f"--shard {text!r} is not i/N with i from 1 to N", hint="such as 1/4, 2/4, 3/4 and 4/4"
        )
    return Shard(int(match[1]) - 1, int(match[2]))
