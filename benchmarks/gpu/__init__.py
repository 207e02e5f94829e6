"""What a GPU makes of attention, losses and training steps: checks of the numbers first, then times, memory and MFU.

    python -m benchmarks.gpu                     everything, to benchmarks/results/gpu-NAME.md
    python -m benchmarks.gpu checks attention    some sections; the others keep their last result
    python -m benchmarks.gpu --toy               the same code at toy sizes, anywhere; so too where there is no GPU
    python -m benchmarks.gpu --list              the table of what would be measured, to benchmarks/results/gpu.md

It needs neither Ray nor data nor weights: models are random, packs are drawn from a fixed seed. A row is written as soon as it
is measured. What cannot be had says why in its note; the exit status is 1 where a check or a measurement failed.
"""
