"""A machine's GPU and CuPy, imitated on the CPU, for tests where there is neither.

`fake_cupy.make()` builds a module that stands in for ``cupy``: arrays that NumPy computes with but
that no NumPy function takes by accident, streams, captured graphs that only run when launched,
memory pools with limits. `cuda.RawModule` compiles and runs CUDA C on the CPU. Nothing in the
package knows of it.
"""
