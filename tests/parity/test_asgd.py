"""Only ASGD keeps the mean of its parameters."""

import jax.numpy as jnp
import numpy as np

import optimjax as optim


def test_the_mean_is_the_parameter_itself_until_two_steps_after_t0() -> None:
    optimizer = optim.ASGD([jnp.array([1e9, 1.0])], lr=0.1, t0=2)
    (parameter,) = optimizer.param_groups[0]["params"]
    path = []
    for step in range(1, 10):
        if step == 3:
            parameter.value = jnp.array([0.3, 0.7])  # a step from 1e9 to here would lose all digits
        optimizer.step([jnp.array([0.1, step])])
        path.append(np.array(parameter.value))
        mean = np.array(optimizer.state[parameter]["ax"])
        if step <= 4:
            np.testing.assert_array_equal(mean, parameter.value)
        else:
            np.testing.assert_allclose(mean, np.mean(path[3:], axis=0), rtol=1e-5)
