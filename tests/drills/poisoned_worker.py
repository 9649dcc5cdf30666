"""`padrec worker` whose decoder raises while a list of 97 is being written: the drill's poison request.

    python -m tests.drills.poisoned_worker --bundle DIR --port 8001

Everything else is the real worker: its engine must find out which request is at fault.
"""

import sys

from model.decoding.list_decoder import ListDecoder
from model.decoding.request import ListResult, RoundStats
from service import cli

POISON_K = 97


def main() -> int:
    """Poison the decoder, then be `padrec worker`."""
    healthy = ListDecoder.round

    def round_(self: ListDecoder) -> tuple[list[ListResult], RoundStats]:
        if any(self.rows.row(index).request.k == POISON_K for index in self.rows.in_use):
            raise RuntimeError("poisoned")
        return healthy(self)

    ListDecoder.round = round_  # type: ignore[method-assign]
    return cli.main(["worker", *sys.argv[1:]])


if __name__ == "__main__":
    raise SystemExit(main())
