"""Checks of the GPU suite. To add one: decorate a function with `registry.check`, and name a new file in `MODULES`."""

# run in this order, and within a file from top to bottom
MODULES = (
    *("smoke", "golden", "numerics", "batched", "packing", "encoder", "compiled", "backbones", "toconv", "adaptive"),
    *("demo", "generation", "training", "kernels"),  # the last one's patches stay in the process
)
