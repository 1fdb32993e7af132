"""Training steps as a user of JAX writes them: one jitted function of parameters and state, which it may overwrite."""

from types import ModuleType

import torch

from benchmarks.work import Contender, Tensors


def training(
    optax: ModuleType, weights: list[torch.Tensor], x: torch.Tensor, target: torch.Tensor, batch: int
) -> Contender:
    """Adam over the batches of x and target, of a network with ReLU between its layers.

    Args:
        weights: (outputs, inputs) and (outputs,) of each layer in turn.
        target: labels, or values like the outputs.
    """
    import jax
    import jax.numpy as jnp

    if x.dtype != torch.float32 or x.device.type != jax.default_backend().replace("gpu", "cuda"):
        raise ValueError(f"jax computes in float32 on {jax.default_backend()} here, not in {x.dtype} on {x.device}")
    steps = x.shape[0] // batch
    inputs, targets = (jnp.asarray(t.cpu().numpy()).reshape(steps, batch, *t.shape[1:]) for t in (x, target))
    optimizer = optax.adam(1e-3)

    def initial():
        params = [jnp.array(w.cpu().numpy()) for w in weights]
        return params, optimizer.init(params)

    def loss_of(params, x, target):
        for i in range(0, len(params), 2):
            x = x @ params[i].T + params[i + 1]
            x = jax.nn.relu(x) if i + 2 < len(params) else x
        if jnp.issubdtype(target.dtype, jnp.integer):
            return optax.softmax_cross_entropy_with_integer_labels(x, target).mean()
        return jnp.square(x - target).mean()

    def step(carry, data):
        params, state = carry
        loss, grads = jax.value_and_grad(loss_of)(params, *data)
        updates, state = optimizer.update(grads, state)
        return (optax.apply_updates(params, updates), state), (loss, grads)

    def epoch(carry, inputs, targets, keep_grads: bool):
        if steps == 1:
            carry, (loss, grads) = step(carry, (inputs[0], targets[0]))
            return carry, loss, grads if keep_grads else None
        if not keep_grads:
            carry, losses = jax.lax.scan(lambda c, d: (lambda n, r: (n, r[0]))(*step(c, d)), carry, (inputs, targets))
            return carry, losses[-1], None
        carry, (losses, grads) = jax.lax.scan(step, carry, (inputs, targets))
        return carry, losses[-1], [g[-1] for g in grads]

    compiled = jax.jit(epoch, static_argnums=3, donate_argnums=0)
    current = [initial()]

    def run(keep_grads: bool = False):
        current[0], loss, grads = compiled(current[0], inputs, targets, keep_grads)
        return jax.block_until_ready((loss, grads))

    def results() -> Tensors:
        current[0] = initial()
        first, grads = run(keep_grads=True)
        second, _ = run()
        return [torch.tensor(t.__array__()).to(x.device) for t in (first, *grads, second)]

    return Contender(run, results)
