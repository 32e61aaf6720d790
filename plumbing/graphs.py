"""CUDA graphs: what a function of tensors starts on the GPU is recorded once and then started at once. A decode of one
small image starts hundreds of kernels, which takes longer than their work.

The first call of its kind is eager, the second records, later ones replay. A graph reads the weights where they lie: it
sees what training or loading has written there, and is recorded anew where they lie elsewhere.
"""
import warnings
import weakref
from collections.abc import Callable
from typing import NamedTuple

import torch

from plumbing import fast
from plumbing.process import first_line

MOST_KINDS = 4              # graphs kept of a module: each has memory of its own
MOST_VALUES = 3 * 2**19     # of an input: 8 images of 256 x 256. With more the work takes longer than starting it.

known = weakref.WeakKeyDictionary()  # {module: {kind of call: Graph, or None after its first}, or None: no more graphs}


class Graph(NamedTuple):
    replay: Callable
    inputs: list            # tensors that it reads,
    outputs: tuple          # and writes
    weights: list           # where and what the module's tensors were: `places`
    tables: list            # what fast.kept has lent it, lest that be freed


def suit(inputs):
    """Whether a call may be replayed: on a GPU, without gradients, and small."""
    return (inputs[0].is_cuda and not torch.is_grad_enabled() and not torch.compiler.is_compiling()
            and max(t.numel() for t in inputs) <= MOST_VALUES and not torch.cuda.is_current_stream_capturing())


def replayed(module, function, inputs, *options):
    """function(*inputs), tensors to a tuple of tensors, by a graph if there is one. Where none can be recorded this is
    said once, and the module's calls stay eager.

    module   whose tensors the function reads
    options  whatever else it depends on: hashable
    """
    device = inputs[0].device.type
    kind = (options, module.training, tuple((t.shape, t.dtype, t.device) for t in inputs),
            torch.is_autocast_enabled(device), torch.get_autocast_dtype(device), current_stream(inputs[0]))
    graphs = known.setdefault(module, {})
    if graphs is None:
        return function(*inputs)
    is_first = kind not in graphs
    graph = graphs[kind] = graphs.pop(kind, None)  # the newest comes last
    for oldest in list(graphs)[:-MOST_KINDS]:
        del graphs[oldest]
    if is_first:
        return function(*inputs)
    weights = places(module)
    if graph is None or graph.weights != weights:
        try:
            graph = graphs[kind] = recorded(function, inputs, weights)
        except RuntimeError as error:
            warnings.warn(f"no CUDA graph of {type(module).__name__}: {first_line(error)}")
            known[module] = None
            return function(*inputs)
    for own, new in zip(graph.inputs, inputs, strict=True):
        own.copy_(new)
    graph.replay()
    return tuple(t.clone() for t in graph.outputs)  # the next replay writes there again


def places(module):
    """Where a module's parameters and buffers lie, and how. It is asked at every call, and nn.Module's own iterators
    alone take twice as long."""
    tensors, modules = [], [module]
    for m in modules:
        if m is not None:
            tensors += m._parameters.values()
            tensors += m._buffers.values()
            modules += m._modules.values()
    tensors = [t for t in tensors if t is not None]
    return [*map(torch.Tensor.data_ptr, tensors), *map(torch.Tensor.stride, tensors), *(t.dtype for t in tensors)]


def recorded(function, inputs, weights):
    """-> Graph of function(*inputs)."""
    device, dtype = inputs[0].device.type, torch.get_autocast_dtype(inputs[0].device.type)
    # Autocast must not lend the graph weights that it has cast before, and drops soon. No tensor is of inference mode:
    # calls outside that mode could not write to these.
    with torch.inference_mode(False), torch.no_grad(), torch.autocast(
            device, dtype, enabled=torch.is_autocast_enabled(device), cache_enabled=False):
        inputs = [t.clone() for t in inputs]
        fast.lent = tables = []
        try:
            replay, outputs = record(function, inputs)
        finally:
            fast.lent = None
    return Graph(replay, inputs, outputs, weights, tables)


def record(function, inputs):
    """-> (what replays the call, its outputs)"""
    with torch.cuda.device(inputs[0].device):
        # Once on another stream than the default, as CUDA wants it: what is made once, is made outside of the graph.
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            function(*inputs)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=side, capture_error_mode="thread_local"):  # others may use the GPU, too
            outputs = function(*inputs)
    return graph.replay, outputs


def current_stream(t):
    """Calls on different streams do not share a graph, whose memory each would write to."""
    return torch.cuda.current_stream(t.device).cuda_stream
