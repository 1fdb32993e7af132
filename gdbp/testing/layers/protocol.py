"""Checks of what surrounds a layer: hooks, checkpointing, modes, autocast, compilation and export."""

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from gdbp.testing.compare import require, same_bits
from gdbp.testing.layers.subject import SUITE, Run, Subject
from gdbp.testing.report import NotApplicable, one_line


def _layer_and_data(subject: Subject, rng: torch.Generator, dtype: torch.dtype = torch.float32):
    layer, x = subject.make(dtype), subject.input(rng, dtype)
    return layer, x, subject.gradient(x, rng)


@SUITE.check("hooks")
def hooks(subject: Subject, rng: torch.Generator) -> str:
    subject.require_no_work_in_place()
    layer, x, g = _layer_and_data(subject, rng)
    fired = []
    layer.register_forward_pre_hook(lambda *_: fired.append("before"))
    layer.register_forward_hook(lambda *_: fired.append("after"))
    layer.register_full_backward_hook(lambda *_: fired.append("backward"))
    x = x.requires_grad_()
    (layer(x * 1) * 1).backward(g)
    require(fired == ["before", "after", "backward"], f"fired {fired} instead of each once")
    return "before and after forward, and after backward, once each"


@SUITE.check("hooks on saved tensors")
def saved_tensor_hooks(subject: Subject, rng: torch.Generator) -> str:
    layer, x, g = _layer_and_data(subject, rng)
    whole = subject.run(subject.twin(layer, torch.float32), x, g)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.clone(), lambda t: t):
        found = subject.run(layer, x, g)
    found.require_same(whole, "saved tensors packed and unpacked")
    return "packed and unpacked, same bits"


@SUITE.check("activation checkpointing")
def checkpointing(subject: Subject, rng: torch.Generator) -> str:
    subject.require_no_work_in_place()
    layer, x, g = _layer_and_data(subject, rng)
    whole = subject.run(subject.twin(layer, torch.float32), x, g)
    found = subject.run(layer, x, g, lambda x: checkpoint(layer, x, use_reentrant=False))
    # Statistics that a forward pass moves are moved by the second one as well, as torch's are.
    kept = {name: tensor for name, tensor in found.tensors.items() if not name.startswith("buffer")}
    Run(kept).require_same(whole, "recomputed")
    return "same bits"


@SUITE.check("no_grad and inference_mode")
def without_gradients(subject: Subject, rng: torch.Generator) -> str:
    layer, x, _ = _layer_and_data(subject, rng)
    layer.eval()
    before = {name: buffer.clone() for name, buffer in layer.named_buffers()}
    with torch.no_grad():
        output = layer(x.clone())
    kept = output.clone()
    with torch.inference_mode():
        other = layer(x.clone())
        layer(-x)
    require(same_bits(output, kept), "a call writes over the output of one before")
    require(not output.requires_grad, "the output requires gradients under no_grad")
    require(same_bits(output, other.clone()), "evaluation differs between no_grad and inference_mode")
    moved = [name for name, buffer in layer.named_buffers() if not same_bits(buffer, before[name])]
    require(not moved, f"evaluation changes buffers: {moved}")
    return "same output; buffers stay in evaluation"


@SUITE.check("autocast")
def autocast(subject: Subject, rng: torch.Generator) -> str:
    layer, x, g = _layer_and_data(subject, rng)
    exact, nearby = subject.exact(layer, x, g), subject.nearby(layer, x.bfloat16(), g, rng)

    def call(x):
        with torch.autocast("cpu", torch.bfloat16):
            return layer(x)

    output = call(x.clone())
    found = subject.run(layer, x, g.to(output.dtype), call)
    for name, tensor in found.tensors.items():
        if "gradient" in name:
            require(tensor.dtype == torch.float32, f"{name} is {tensor.dtype}; expected float32, as the tensor itself")
    coarse = Run({n: t.to(torch.bfloat16) for n, t in found.tensors.items() if t.is_floating_point()})
    evidence = coarse.require_close(exact, "in bfloat16: ", nearby) if not any(True for _ in layer.buffers()) else ""
    return f"{evidence or 'gradients in float32'}; output in {str(output.dtype).removeprefix('torch.')}"


@SUITE.check("torch.compile")
def compiled(subject: Subject, rng: torch.Generator) -> str:
    layer, x, g = _layer_and_data(subject, rng)
    exact = subject.exact(layer, x, g)
    torch._dynamo.reset()
    try:
        call = torch.compile(layer, fullgraph=True, backend="aot_eager")
        return subject.run(layer, x, g, call).require_close(exact, "one graph: ")
    finally:
        torch._dynamo.reset()


@SUITE.check("torch.export")
def exported(subject: Subject, rng: torch.Generator) -> str:
    layer, x, _ = _layer_and_data(subject, rng)
    layer.eval()
    with torch.no_grad():
        program = torch.export.export(layer, (x,))
        require(torch.allclose(program.module()(x), layer(x)), "the exported program computes something else")
    return "evaluation, same output"


@SUITE.check("fake tensors")
def fake(subject: Subject, rng: torch.Generator) -> str:
    """What a tracer is told of the output before there is one."""
    layer, x = subject.make(), subject.input(rng)
    real = layer(x.clone())
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        told = layer(mode.from_tensor(x))
    for what in ("shape", "dtype", "device"):
        a, b = getattr(told, what), getattr(real, what)
        require(a == b, f"{what} is {a} for a fake tensor and {b} for a real one")
    made = layer.to("meta")(x.to("meta")).device
    require(made.type == "meta", f"moved to the meta device, with its input, the output is on {made}")
    require(told.stride() == real.stride(), f"strides are {told.stride()} for a fake tensor and {real.stride()} really")
    return "shape, strides, dtype and device as told"


@SUITE.check("dtype mismatch")
def mismatch(subject: Subject, rng: torch.Generator) -> str:
    layer = subject.make()
    if not any(p.is_floating_point() for p in layer.parameters()):
        raise NotApplicable("no parameters")
    x = subject.input(rng, torch.float64)
    try:
        output = layer(x.clone())
    except (RuntimeError, TypeError, ValueError) as error:
        return f"float64 input, float32 layer: {one_line(str(error))}"
    exact = subject.twin(layer, torch.float64)(x.clone())
    worst = (output.double() - exact).abs().max().item()
    require(
        worst <= 1e-4 * max(1.0, exact.abs().max().item()), "a float64 input to a float32 layer gives wrong numbers"
    )
    return "float64 input, float32 layer: computed"
