"""The kernels that ``torch.compile`` generates for a GPU that is not there.

The graph is traced on fake tensors of the CPU, since a build of PyTorch without CUDA has no autograd for its devices.
Its devices are then replaced, and Inductor is asked for the code of the GPU. The code is executed on fake tensors, with
every kernel recorded where it would be launched. Inductor would time the configurations of a kernel and keep the
fastest; all of them are given here.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import torch
from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
from torch import Tensor
from torch._dynamo.device_interface import CudaInterface
from torch._functorch.aot_autograd import aot_function
from torch._guards import TracingContext, tracing
from torch._inductor import async_compile
from torch._inductor.compile_fx import compile_fx_inner
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.graph import GraphLowering
from torch._inductor.runtime.triton_heuristics import GridExpr
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import GraphModule
from torch.fx.passes.fake_tensor_prop import FakeTensorProp
from triton.runtime.driver import driver

from benchmarks.audit.builds import Launch
from benchmarks.audit.contest.pretended import reported
from benchmarks.audit.processors import PROCESSORS


def traced(function: Callable[..., tuple[Tensor, ...]], inputs: Callable[[], list[Tensor]]) -> dict[str, GraphModule]:
    """The graphs ``forward`` and ``backward``; there is the latter if an input requires a gradient."""
    graphs = {}

    def keep(name: str) -> Callable:
        def compiler(graph: GraphModule, _inputs: list) -> Callable:
            graphs[name] = graph
            return make_boxed_func(graph.forward)

        return compiler

    with FakeTensorMode():
        compiled = aot_function(
            function,
            keep("forward"),
            keep("backward"),
            partition_fn=min_cut_rematerialization_partition,
            decompositions=select_decomp_table(),
        )
        outputs = compiled(*inputs())
        torch.autograd.backward(outputs, [torch.empty_like(output) for output in outputs])
    return graphs


def generated(graph: GraphModule, target: str, folder: Path, backward: bool) -> Callable[[], list[list[Launch]]]:
    """Runs the code for ``graph``, and gives the launches, each with every configuration that Inductor would time.

    Its modules are written to ``folder``.
    """
    sources: list[str] = []

    class Enough(Exception):
        pass

    def take(lowering: GraphLowering) -> None:
        sources.append(lowering.codegen()[0].value)
        raise Enough

    with _as_if_on(target) as device, patch.object(GraphLowering, "compile_to_module", take):
        mode = FakeTensorMode()
        inputs = _moved(graph, mode, device)
        with tracing(TracingContext(mode)):
            try:
                compile_fx_inner(graph, inputs, is_backward=backward)
            except Exception:
                if not sources:
                    raise
        return _runner(sources[0], inputs, folder)


@contextmanager
def _as_if_on(target: str) -> Iterator[torch.device]:
    with ExitStack() as stack:
        device = stack.enter_context(reported(target))
        replaced = {
            "get_device_properties": staticmethod(lambda *_: torch.cuda.get_device_properties(device)),
            "current_device": staticmethod(lambda: device.index),
            "is_available": staticmethod(lambda: True),
            "is_bf16_supported": staticmethod(lambda *_, **__: True),
        }
        stack.enter_context(patch.multiple(CudaInterface, **replaced))
        stack.enter_context(patch("torch._inductor.scheduler.has_triton", lambda: True))
        stack.enter_context(patch("torch._inductor.runtime.triton_helpers.set_driver_to_gpu", lambda: None))
        stack.enter_context(torch._inductor.config.patch(fx_graph_cache=False, autotune_local_cache=False))
        stack.callback(driver.set_active, driver._active)
        driver.set_active(
            SimpleNamespace(
                get_current_target=lambda: PROCESSORS[target].target,
                get_current_device=lambda: device.index,
                get_device_interface=lambda: torch.cuda,
            )
        )
        yield device


def _moved(graph: GraphModule, mode: FakeTensorMode, device: torch.device) -> list:
    """Moves a graph to ``device``, and gives its inputs there."""
    inputs = []
    for node in graph.graph.nodes:
        if "device" in node.kwargs:
            node.kwargs = {**node.kwargs, "device": device}
        if node.op == "placeholder":
            value = node.meta["val"]
            with mode:
                inputs.append(torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=device))
    FakeTensorProp(graph, mode).propagate_dont_convert_inputs(*inputs)
    return inputs


def _runner(source: str, inputs: list[Tensor], folder: Path) -> Callable[[], list[list[Launch]]]:
    found: list[list[Launch]] = []

    def triton(_compiler, name: str, code: str, device_str: str) -> SimpleNamespace:
        file = folder / f"{name}.py"
        file.write_text(code)
        kernel = getattr(_imported(file), name)

        def run(*arguments, stream: object) -> None:
            named = dict(zip(kernel.fn.arg_names, arguments, strict=False))
            found.append([_choice(kernel, named, config) for config in kernel.configs])

        return SimpleNamespace(run=run)

    file = folder / "wrapper.py"
    file.write_text(source)
    with (
        patch.object(async_compile.AsyncCompile, "triton", triton),
        patch.object(async_compile.AsyncCompile, "wait", lambda *_: None),
        patch.object(torch._C, "_cuda_getCurrentRawStream", lambda *_: 0, create=True),
    ):
        wrapper = _imported(file)
    # What these do in C++ needs memory.
    wrapper.empty_strided_cuda = lambda size, stride, dtype: torch.empty_strided(size, stride, dtype=dtype)
    wrapper.reinterpret_tensor = lambda tensor, size, stride, offset: tensor.as_strided(size, stride, offset)
    wrapper.copy_if_misaligned = lambda tensor: tensor
    wrapper.assert_size_stride = lambda *_: None

    def run() -> list[list[Launch]]:
        with (
            patch.object(torch.cuda, "_DeviceGuard", lambda *_: nullcontext()),
            patch.object(torch.cuda, "set_device", lambda *_: None),
            FakeTensorMode(),
        ):
            # Of the CPU, where a slice can be taken.
            wrapper.call([torch.empty_strided(i.shape, i.stride(), dtype=i.dtype) for i in inputs])
        return found

    return run


def _choice(kernel, arguments: dict[str, object], config) -> Launch:
    grid = GridExpr.from_meta(kernel.inductor_meta, config).eval_slow({**arguments, **config.kwargs})
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
    if "enable_fp_fusion" in kernel.triton_meta:
        options["enable_fp_fusion"] = kernel.triton_meta["enable_fp_fusion"]
    return Launch(kernel.fn, {**arguments, **kernel.triton_meta["constants"], **config.kwargs}, options, tuple(grid))


def _imported(file: Path):
    spec = spec_from_file_location(f"generated_{file.parent.name}_{file.stem}", file)
    module = module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module
