"""One finished run for the tests of a file."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

from tests.faults import count_writes

if TYPE_CHECKING:
    from tests.run.test_record import Kit


@pytest.fixture(scope="module")
def kit(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Kit]:
    from tests.run.test_record import Kit

    with count_writes():
        kit = Kit(tmp_path_factory.mktemp("kit"))
        kit.fit()
        yield kit
