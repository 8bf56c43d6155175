"""Everything that is to be known of an accelerator, measured in the minutes that one is rented for.

    python -m experiments.accelerator --pack=carried           # where a registry is reached
    PYTHONPATH=carried python -m experiments.accelerator --minutes=8 --out=found

The machine reaches no registry. It has jax for its device and what `carried.THERE` lists; what is
missing of the rest travels in the folder that `--pack` fills.

Each part is a process of its own with a share of the minutes, in this order:

    machine    what it is: versions, and the peaks of products and of memory, measured
    large      `large` in bfloat16 with the fused kernel, at the largest batch that fits
    turns      the same training in PyTorch, compiled, a turn each
    checks     the kernel against the reference under every rule; donation; offloaded activations
    decoding   tokens a second of `large`, against the time in which its weights can be read
    ladder     `base` with and without 16 bits, fused kernel and recomputation
    loader     pictures a second that the cores decode
    world      a training of `base` on the world, scored; and what options of inference cost

What is found is in one file, `accelerator.json`, written row by row: what ends a part takes no row
of it. A second call goes on with the rows that are missing or failed. It reads what the first one
compiled from the folder of work, so that `compile_seconds` of such a row may be of reading.
"""
