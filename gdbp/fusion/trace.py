"""A module's forward as torch.fx sees it, and the same with its runs in one call each."""

import collections
import copy
import inspect
from typing import Any

import torch
from torch import fx

from gdbp.fusion import activations
from gdbp.fusion.classes import Code, class_of, forward_of
from gdbp.fusion.follow import is_written_over, trace, writes
from gdbp.fusion.reads import Notes, Read, noting
from gdbp.fusion.report import Fused, FuseReport, Left, cut_short, is_candidate, why_not
from gdbp.fusion.run import LINEARS, NORMS, SAVED_BY_OUTPUT, Layer, Run, match, run
from gdbp.ops._function import is_dense


class Untraceable(Exception):
    """Why a forward cannot be rewritten."""


def rewrite(module: torch.nn.Module, names: dict[torch.nn.Module, str]) -> tuple[Code | None, FuseReport]:
    """The forward of a module with its runs fused (None where there are none), and what was found in it, by the
    ``names`` that modules have.

    Raises:
        Untraceable: forward cannot be followed, or does more than its graph would.
    """
    graph, reads = _trace(module)
    fused: list[Fused] = []
    left: list[Left] = []
    taken: set[fx.Node] = set()
    for node in list(graph.nodes):
        if node in taken or node.op != "call_module" or not is_candidate(module.get_submodule(node.target)):
            continue
        chain, end = _chain(node, module)
        layers = [layer for _, layer in chain]
        called = [names[layer] if n.op == "call_module" else f"{_called(n)}()" for n, layer in chain]
        found = match(layers, 0)
        if found is None:
            left.append(Left(called[0], why_not(layers, called, end)))
            continue
        why = _obstacle(graph, [n for n, _ in chain[: found.length]], found, module)
        if why:
            left.append(Left(called[0], why))
            continue
        fused.append(Fused(tuple(called[: found.length]), str(found)))
        left += cut_short(found, layers[found.length :], called[found.length :])
        taken.update(n for n, _ in chain[: found.length])
        _replace(graph, chain[: found.length])
    report = FuseReport(tuple(fused), tuple(left))
    if not fused:
        return None, report
    _join(graph, module)
    graph.lint()
    prefix = names[module] + "." if names[module] else ""
    runs = tuple(" + ".join(name.removeprefix(prefix) for name in each.layers) for each in fused)
    return Code.of(graph, runs, reads), report


# ---- the graph ----


def _trace(module: torch.nn.Module) -> tuple[fx.Graph, tuple[Read, ...]]:
    forward = forward_of(module)
    if "forward" in vars(module):
        raise Untraceable(f"{_of(module)} was replaced")
    optional = [
        name
        for name, p in inspect.signature(forward).parameters.items()
        if p.default is not p.empty or p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
    ]
    if optional:
        raise Untraceable(f"{_of(module)} has arguments that may be left out ({', '.join(optional)})")
    (graph, reads), (other, others) = (_trace_once(module, training) for training in (True, False))
    if _source(graph) != _source(other):
        raise Untraceable(f"{_of(module)} is another in training than in evaluation")
    for node in graph.nodes:
        if node.op == "get_attr" and not _has(module, node.target):
            raise Untraceable(f"{_of(module)} makes a tensor ({node.target}), which would become a constant")
    return graph, tuple(dict.fromkeys(reads + others))


def _trace_once(module: torch.nn.Module, training: bool) -> tuple[fx.Graph, tuple[Read, ...]]:
    # What forward writes goes to a twin, of it and of all below it, which shares parameters and buffers alone.
    twins: dict[torch.nn.Module, torch.nn.Module] = {}
    notes = Notes()
    try:
        twin = _twin(module, twins, notes)
        for each in twins.values():
            vars(each)["training"] = training
        before = [(each, {name: _kept(value) for name, value in vars(each).items()}) for each in twins.values()]
        with torch.random.fork_rng(devices=[]):
            graph = trace(twin)
    except Exception as error:
        first = str(error).strip().split("\n")[0]
        raise Untraceable(f"torch.fx cannot follow {_of(module)}: {first or type(error).__name__}") from error
    for each, kept in before:
        owner = "self" if each is twin else type(each).__name__
        for name, value in vars(each).items():
            known = kept.get(name, (None, 0))
            if not name.startswith("_tensor_constant") and not _same(known, _kept(value)):
                raise Untraceable(f"{_of(module)} changes {owner}.{name}")
    return graph, notes.reads(twin)


def _twin(module: torch.nn.Module, twins: dict[torch.nn.Module, torch.nn.Module], notes: Notes) -> torch.nn.Module:
    if module not in twins:
        twins[module] = twin = noting(class_of(module), notes)
        twin.__dict__.update({name: _copied(value) for name, value in vars(module).items()})
        twin._modules = {
            key: None if child is None else _twin(child, twins, notes) for key, child in module._modules.items()
        }
    return twins[module]


def _of(module: torch.nn.Module) -> str:
    return f"the forward of {class_of(module).__name__}"


def _copied(value: Any) -> Any:
    if not isinstance(value, torch.Tensor):
        return _refilled(value)
    # Between calls FullyShardedDataParallel leaves tensors whose memory it has freed: they are not to be read.
    freed = type(value) is torch.Tensor and is_dense(value) and value.numel() and not value.untyped_storage().size()
    return value if freed else value.detach().clone()


def _refilled(value: Any) -> Any:
    """Containers, and those in them, as new ones with the same things in them."""
    if type(value) is tuple:
        return tuple(map(_refilled, value))
    if not isinstance(value, (list, dict, set, collections.deque)):
        return value
    twin = copy.copy(value)
    if not isinstance(value, set):
        for key, item in list(value.items() if isinstance(value, dict) else enumerate(value)):
            twin[key] = _refilled(item)
    return twin


def _kept(value: Any) -> tuple[Any, int]:
    """What to compare a value with later: tensors are changed in place, and count how often."""
    return (value, value._version) if isinstance(value, torch.Tensor) else (_refilled(value), 0)


def _same(a: Any, b: Any) -> bool:
    if type(a) is not type(b):
        return False
    if isinstance(a, dict):
        return list(a) == list(b) and all(map(_same, a.values(), b.values()))
    if isinstance(a, (list, tuple, collections.deque)):
        return len(a) == len(b) and all(map(_same, a, b))
    return a is b or (isinstance(a, (int, float, str, set)) and a == b)


def _source(graph: fx.Graph) -> str:
    return graph.python_code("self").src


def _has(module: torch.nn.Module, target: str) -> bool:
    owner, _, name = target.rpartition(".")
    return hasattr(module.get_submodule(owner), name)


# ---- runs in it ----


def _chain(node: fx.Node, module: torch.nn.Module) -> tuple[list[tuple[fx.Node, Layer]], str]:
    """Up to three calls, from ``node`` on, each of which alone uses the result of the one before; and why it ends."""
    chain = [(node, module.get_submodule(node.target))]
    while len(chain) < 3:
        last = chain[-1][0]
        users = list(last.users)
        if len(users) != 1:
            return chain, "its output is used more than once" if users else "nothing follows"
        (user,) = users
        if user.op == "output":
            return chain, "nothing follows"
        layer, why = _layer(user, last, module)
        if layer is None:
            return chain, f"followed by {why or _called(user)}"
        chain.append((user, layer))
    return chain, "nothing follows"


def _layer(node: fx.Node, input: fx.Node, module: torch.nn.Module) -> tuple[Layer | None, str]:
    """What this node does to its input alone: a module, the name of an activation, or None and maybe why."""
    args, kwargs = node.args, dict(node.kwargs)
    args = args or (kwargs.pop("input", None),)
    if args[0] is not input:
        return None, ""
    if node.op == "call_module":
        return (module.get_submodule(node.target), "") if len(args) == 1 and not kwargs else (None, "")
    return activations.of_call(node.target, args[1:], kwargs)


def _called(node: fx.Node) -> str:
    return node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))


def _between(graph: fx.Graph, chain: list[fx.Node]) -> list[fx.Node]:
    """What is done between the first and the last of these calls, besides them."""
    nodes = list(graph.nodes)
    span = nodes[nodes.index(chain[0]) : nodes.index(chain[-1])]
    return [node for node in span if node not in chain]


def _obstacle(graph: fx.Graph, chain: list[fx.Node], found: Run, module: torch.nn.Module) -> str:
    """Why these calls, which make up a run, cannot be one; empty where they can."""
    if found.norm is not None and any(writes(node, module) for node in _between(graph, chain)):
        return "something is written in place between it and its batch norm"
    if found.activation in SAVED_BY_OUTPUT and is_written_over(chain[-1], module):
        return f"its {found.activation} is written over, and must be kept for the backward pass"
    return ""


def _replace(graph: fx.Graph, chain: list[tuple[fx.Node, Layer]]) -> None:
    nodes = [node for node, _ in chain]
    first, last = nodes[0], nodes[-1]
    # Where the first layer was, as what the forward does to its input later must stay later; but statistics move where
    # their batch norm was.
    has_norm = any(isinstance(layer, torch.nn.Module) and type(layer) in NORMS for _, layer in chain)
    with graph.inserting_before(last if has_norm else first):
        layers = [layer if isinstance(layer, str) else graph.get_attr(node.target) for node, layer in chain]
        fused = graph.call_function(run, (first.args or tuple(first.kwargs.values()))[:1] + tuple(layers))
    last.replace_all_uses_with(fused)
    for node in reversed(nodes):
        graph.erase_node(node)


def _join(graph: fx.Graph, module: torch.nn.Module) -> None:
    """Makes one call of those of linear layers that follow one another: narrow layers are computed together."""
    before = None
    for node in list(graph.nodes):
        if node.op == "get_attr":
            continue
        layers = _linear_layers(node, module)
        if layers and before is not None and node.args[0] is before and len(before.users) == 1:
            with graph.inserting_before(node):
                layers = [graph.get_attr(layer.target) if isinstance(layer, fx.Node) else layer for layer in layers]
                joined = graph.call_function(run, before.args + tuple(layers))
            node.replace_all_uses_with(joined)
            graph.erase_node(node)
            graph.erase_node(before)
            before = joined
        else:
            before = node if layers and node.target is run else None


def _linear_layers(node: fx.Node, module: torch.nn.Module) -> list[fx.Node | str]:
    """What this node calls one after the other, if these are linear layers and activations alone."""
    if node.op == "call_module":
        is_linear = type(module.get_submodule(node.target)) in LINEARS and len(node.args) == 1 and not node.kwargs
        return [node] if is_linear else []
    if node.op != "call_function" or node.target is not run:
        return []
    layers = list(node.args[1:])
    modules = [module.get_submodule(layer.target) for layer in layers if isinstance(layer, fx.Node)]
    return [] if any(type(each) in NORMS for each in modules) else layers
