"""The kernels of the book's last chapter, each a step further than the one before.

- `recurrence`: one step, one block, one row, a tile of channels, backwards
- `forward`: the selective scan, from one channel with one state to the package's plain kernel
- `backward`: its gradients, likewise

Each function checks nothing and takes contiguous float32 tensors on one device. They are there to
be read; the last step of each row is the package's own kernel.
"""

import difflib
import inspect


def difference(before: object | None, after: object) -> str:
    """Return the source of a kernel, its lines that another one does not have marked with +."""
    new = _source(after)
    if before is None:
        return "\n".join(new)
    lines = difflib.ndiff(_source(before), new)
    return "\n".join(line for line in lines if line[:2] in {"  ", "+ "})


def _source(kernel: object) -> list[str]:
    """Return the lines of a kernel's source, without its decorator and its docstring."""
    function = getattr(kernel, "fn", kernel)
    source = inspect.getsource(function)
    if function.__doc__:
        quoted = source.index('"""')
        end = source.index('"""', quoted + 3) + 3
        source = source[:quoted].rstrip(" ") + source[end:].lstrip("\n")
    return [line for line in source.rstrip().splitlines() if not line.startswith("@")]
