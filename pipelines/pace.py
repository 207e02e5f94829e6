"""Ray Data's loop, held to the pace of training: it neither makes what nobody wants yet nor turns without pause.

Both are seen where training is slower than its data, which is how it should be: without these two the loop takes a core for
itself and the window numbers of a stream without end another. Ray has no public name for what they use; its release is pinned.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from ray.data import DataContext
from ray.data._internal.execution.backpressure_policy import (
    ENABLED_BACKPRESSURE_POLICIES,
    ENABLED_BACKPRESSURE_POLICIES_CONFIG_KEY,
    BackpressurePolicy,
)
from ray.data._internal.execution.execution_callback import ExecutionCallback
from ray.data._internal.execution.operators.input_data_buffer import InputDataBuffer

if TYPE_CHECKING:
    from ray.data._internal.execution.interfaces import PhysicalOperator
    from ray.data._internal.execution.streaming_executor import StreamingExecutor

NUMBERS = 64
"""Window numbers that may wait to be planned."""

PAUSE = 0.02
"""Seconds between two turns of the loop where every rank has what it will take next."""


class FewNumbers(BackpressurePolicy):
    """Holds window numbers back where `NUMBERS` of them wait to be planned.

    Ray Data holds an operator back by the bytes that it has made and nobody has taken. Numbers weigh nothing: those of a stream
    without end would be made for ever, and kept.
    """

    def max_task_output_bytes_to_read(self, op: PhysicalOperator) -> int | None:
        sources = op.input_dependencies
        if not sources or not all(isinstance(source, InputDataBuffer) for source in sources):
            return None  # what numbers become has weight
        waiting = sum(self._topology[user].total_enqueued_input_blocks() for user in op.output_dependencies)
        return 0 if waiting >= NUMBERS else None


class Breath(ExecutionCallback):
    """Lets the loop pause where every rank has something waiting for it.

    It sleeps until a task has something to give. A task that was held back has, all the time.
    """

    def on_execution_step(self, executor: StreamingExecutor) -> None:
        assert executor._output_node  # it runs
        _, last = executor._output_node
        if all(len(queue) for queue in last.output_queue._queues):
            time.sleep(PAUSE)


def settle(data: DataContext) -> None:
    """Have the datasets that are made under `data` keep to this pace."""
    data.set_config(ENABLED_BACKPRESSURE_POLICIES_CONFIG_KEY, [*ENABLED_BACKPRESSURE_POLICIES, FewNumbers])
    data.custom_execution_callback_classes = [Breath]
