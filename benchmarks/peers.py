"""The forward pass in other libraries, where they are installed (the extra [peers]); float32, contiguous.

torch.compile is there always. ncnn computes one image at a time, so it runs at N = 1 only. Models are built once; what
is timed is a call that takes a numpy array or tensor and returns one.
"""

import importlib.util
import tempfile
from collections.abc import Callable
from functools import cache, partial
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as theirs

from benchmarks import operators
from benchmarks.workloads import Workload

LIBRARIES = {"onnxruntime": "onnx", "openvino": "onnx", "ncnn": "ncnn"}  # and what builds its model


@cache
def installed() -> list[str]:
    def found(*names):
        return all(importlib.util.find_spec(name) for name in names)

    return [name for name, builder in LIBRARIES.items() if found(name, builder)]


def versions() -> dict[str, str]:
    return {name: version(name) for name in installed()}


def forward(load: Workload, leaves: list[Tensor]) -> dict[str, Callable]:
    """The contestants that know this operator."""
    if load.dtype != torch.float32:
        return {}
    found = {"torch.compile": _compiled(load, leaves)}
    for name in installed():
        call = {"onnxruntime": _onnxruntime, "openvino": _openvino, "ncnn": _ncnn}[name](load, leaves)
        if call:
            found[name] = call
    return found


def _compiled(load, leaves):
    torch.compiler.reset()
    call = torch.compile(partial(getattr(theirs, load.kind), **operators.arguments(load)), dynamic=False)
    return lambda: call(*leaves)


def _onnx(load: Workload, leaves: list[Tensor]) -> bytes | None:
    """A model of this one operator, with the weights inside."""
    from onnx import TensorProto, helper, numpy_helper

    case = load.case
    windows = {"kernel_shape": case.kernel, "strides": case.stride, "pads": case.padding * 2}
    if "pool" in load.kind:
        windows["ceil_mode"] = int(case.ceil_mode)
    names = {
        "conv2d": ("Conv", windows | {"dilations": case.dilation, "group": getattr(case, "groups", 1)}),
        "max_pool2d": ("MaxPool", windows | {"dilations": case.dilation}),
        "avg_pool2d": ("AveragePool", windows | {"count_include_pad": 1}),
        "relu": ("Relu", {}),
        "leaky_relu": ("LeakyRelu", {"alpha": operators.SLOPE}),
        "prelu": ("PRelu", {}),
    }
    if load.kind not in names:
        return None
    operator, attributes = names[load.kind]
    weights = [w.view(-1, 1, 1) if load.kind == "prelu" else w for w in leaves[1:]]
    stored = [numpy_helper.from_array(w.numpy(), f"w{i}") for i, w in enumerate(weights)]
    node = helper.make_node(operator, ["x", *(w.name for w in stored)], ["y"], **attributes)
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, list(case.input_shape))
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    graph = helper.make_graph([node], load.kind, [x], [y], stored)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    return model.SerializeToString()


def _onnxruntime(load, leaves):
    model = _onnx(load, leaves)
    return run_onnxruntime(model, leaves[0]) if model else None


def run_onnxruntime(model: bytes, x: Tensor) -> Callable:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    feed = {session.get_inputs()[0].name: x.numpy()}
    return lambda: torch.from_numpy(session.run(None, feed)[0])


def _openvino(load, leaves):
    model = _onnx(load, leaves)
    return run_openvino(model, leaves[0]) if model else None


def run_openvino(model: bytes, x: Tensor) -> Callable:
    import openvino

    settings = {
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "INFERENCE_PRECISION_HINT": "f32",
        "PERFORMANCE_HINT": "LATENCY",
    }
    core = openvino.Core()
    request = core.compile_model(core.read_model(model), "CPU", settings).create_infer_request()
    image = x.numpy()
    return lambda: torch.from_numpy(request.infer([image], share_inputs=True, share_outputs=True)[0])


def _ncnn(load, leaves):
    import ncnn

    case = load.case
    if load.kind not in ("conv2d", "max_pool2d") or case.n != 1 or (load.kind == "max_pool2d" and case.ceil_mode):
        return None
    (kh, kw), (sh, sw), (ph, pw), (dh, dw) = case.kernel, case.stride, case.padding, case.dilation
    if load.kind == "max_pool2d":
        layer = f"Pooling y 1 1 x y 0=0 1={kw} 11={kh} 2={sw} 12={sh} 3={pw} 13={ph} 14={pw} 15={ph} 5=1"
        weights = b""
    else:
        x, w, *bias = leaves
        kind = "Convolution" if case.groups == 1 else "ConvolutionDepthWise"
        settings = f"0={case.k} 1={kw} 11={kh} 2={dw} 12={dh} 3={sw} 13={sh} 4={pw} 14={ph} 15={pw} 16={ph}"
        layer = f"{kind} y 1 1 x y {settings} 5={len(bias)} 6={w.numel()} 7={case.groups}"
        # a flag that says float32 stands before the weights, none before the bias
        weights = np.zeros(1, np.uint32).tobytes() + w.numpy().tobytes() + b"".join(b.numpy().tobytes() for b in bias)
    net = ncnn.Net()
    net.opt.num_threads = torch.get_num_threads()
    net.opt.use_fp16_storage = net.opt.use_fp16_arithmetic = net.opt.use_bf16_storage = False
    with tempfile.TemporaryDirectory() as folder:
        parameters, numbers = Path(folder, "net.param"), Path(folder, "net.bin")
        parameters.write_text(f"7767517\n2 2\nInput x 0 1 x\n{layer}\n")
        numbers.write_bytes(weights)
        net.load_param(str(parameters))
        net.load_model(str(numbers))
    image = ncnn.Mat(leaves[0][0].numpy())

    def call():
        extractor = net.create_extractor()
        extractor.input("x", image)
        return torch.from_numpy(np.asarray(extractor.extract("y")[1]))[None]

    call.keeps = net, image
    return call
