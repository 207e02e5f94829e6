"""What trying again cannot mend ends a stage with words, whichever ranks meet it."""

from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pytest

from cluster.failure import Failures
from cluster.lease import Lease
from cluster.metrics import RunFolder
from cluster.site import Site
from tests.cluster.test_every_recipe import job_of, unlike
from tests.ranks import Ranks, dealt
from tests.structures import small


def cut(table: pa.Table) -> pa.Table:
    """A hand whose tiles came over short: it cannot be read, however often it is tried."""
    at = table.column_names.index("tiles")
    (cell,) = table.column("tiles").to_pylist()
    return table.set_column(at, "tiles", pa.array([cell[: len(cell) // 2]], pa.large_binary()))


@pytest.mark.parametrize("failing", [{0}, {1}, {0, 1}])
def test_a_failure_of_any_rank_ends_the_stage_with_its_words(
    failing: set[int], ranks: Ranks, site: Site, tmp_path: Path
) -> None:
    """Of one rank alone it ends the group, since the other waits; the next group, whose data is whole, finds what was written."""
    recipe = replace(small("vila_smoke"), held_out=())
    run = RunFolder(tmp_path / "run")
    lease = Lease(run.root)
    try:
        job = job_of(recipe, recipe.stage("align"), site, run, lease.token, None)
        tables = dealt(job.stream, unlike(job.stream))
        spoilt = [cut(tables[1][0])]  # whose packs have pictures
        broken = [spoilt if rank in failing else of_rank for rank, of_rank in enumerate(tables)]
        with pytest.raises(AssertionError, match="cannot reshape") as raised:
            ranks.train(job, broken)
        aloud = {rank for rank in range(2) if f"rank {rank}:" in str(raised.value)}
        assert aloud >= failing if len(failing) < 2 else not aloud
        with pytest.raises(AssertionError, match="cannot reshape") as raised:
            ranks.train(job, tables)
        assert not any(f"rank {rank}" in str(raised.value) for rank in range(2)), "both left by themselves"
        assert job.resume_from() is None, "no step was taken"
        Failures(run).clear()
        ranks.train(job, tables)
        assert job.resume_from()
    finally:
        lease.release()
