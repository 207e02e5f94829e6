"""Two ranks of the real loop, which tests of this folder share."""

from collections.abc import Iterator

import pytest

from tests.ranks import Ranks


@pytest.fixture(scope="session")
def ranks(ray_cluster: None) -> Iterator[Ranks]:  # noqa: ARG001 -- a fixture cannot use `usefixtures`
    both = Ranks()
    yield both
    both.end()
