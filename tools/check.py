"""The first two minutes on a new machine: does everything compute the right thing there, and without waiting?

    python -m tools.check                 # on the best device there is
    python -m tools.check --device cpu --skip speed

Compares values and gradients with float64 on the CPU, counts copies and synchronisations between host and device,
compares two processes with one where there are two GPUs, and measures images/s, eager and compiled. The last line says
"healthy", or what is not; then the exit status is 1.
"""
import torch
from torch.utils._python_dispatch import TorchDispatchMode

READS = ("_local_scalar_dense", "is_nonzero", "nonzero", "masked_select", "unique2", "_unique2")  # wait for the device


class HostTraffic(TorchDispatchMode):
    """Counts, while it is active, what would make a GPU and its host wait for each other. The operations are the same
    on every device, so this can be counted on the CPU too.

    copies  tensors made of Python numbers or moved between devices
    reads   values read back: item(), bool(), tolist(), indexing by a mask, copies to the CPU
    """

    def __init__(self):
        super().__init__()
        self.copies, self.reads, self.paused = [], [], False

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        out = function(*arguments, **(options or {}))
        if self.paused:
            return out
        name = function.overloadpacket.__name__
        if name == "lift_fresh":  # torch.tensor([...])
            self.copies.append(name)
        elif name in READS:
            self.reads.append(name)
        elif name in ("index", "index_put_") and any(is_slow_index(i, arguments[0]) for i in arguments[1]):
            self.reads.append(name)
        elif name in ("_to_copy", "copy_"):
            target, source = (out, arguments[0]) if name == "_to_copy" else arguments[:2]
            if source.device != target.device:
                (self.reads if target.device.type == "cpu" else self.copies).append(name)
        return out


def is_slow_index(index, t):
    """Whether a GPU would have to wait for this index of t: a mask, whose number of hits the host must know, or indices
    that lie elsewhere."""
    return index is not None and (index.dtype is torch.bool or index.device != t.device)
