"""What each process runs, for test_persistent_cache.py: every kind of program, with a cache of compiled ones."""

import json
import sys
from collections import Counter
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import optimjax as optim
from optimjax import functional as F

jax.config.update("jax_compilation_cache_dir", sys.argv[1])
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
events: Counter[str] = Counter()
jax.monitoring.register_event_listener(lambda event, **_: events.update([event.rpartition("/")[2]]))
params = {"w": np.linspace(-1, 1, 6, dtype=np.float32).reshape(3, 2), "b": np.ones(2, np.float32)}
x = np.linspace(0, 1, 12, dtype=np.float32).reshape(4, 3)
results: list[Any] = []


def loss_fn(params: Any, x: Any) -> Any:
    return jnp.mean((x @ params["w"] + params["b"]) ** 2)


def loss_of_model(model: Any, x: Any) -> Any:
    return jnp.mean(model(x) ** 2)


def by_facade() -> None:
    for optimizer in (optim.AdamW(params), optim.SGD(params, momentum=0.9), optim.Rprop(params)):
        optimizer.step(loss_fn, x)
        optimizer.backward(loss_fn, x)
        optim.clip_grad_norm_(optimizer, 0.1)
        optimizer.step()
        optimizer.donate = True
        optimizer.step(params)
        results.append(optimizer.params)


def by_module() -> None:
    model = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
    optimizer = optim.Adam(model)
    optimizer.step(loss_of_model, x)
    results.append(nnx.state(model))


def by_search() -> None:
    optimizer = optim.LBFGS(params, line_search_fn="strong_wolfe", max_iter=2)
    optimizer.step(loss_fn, x)
    results.append(optimizer.params)


def by_functions() -> None:
    for algorithm in (F.adamw(lr=lambda count: 0.1 / (1 + count)), F.adafactor(), F.muon()):
        known = {"w": params["w"]}
        update = jax.jit(algorithm.update)
        results.append(update(known, known, algorithm.init(known)))


for run in (by_facade, by_module, by_search, by_functions):
    run()
numbers = [np.asarray(leaf).tolist() for leaf in jax.tree.leaves(results)]
print(json.dumps({"hits": events["cache_hits"], "misses": events["cache_misses"], "numbers": numbers}))
