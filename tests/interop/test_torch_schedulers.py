"""What PyTorch's schedulers have saved is read here and continued with the same rates, and ours there."""

import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from scheduler_cases import build, build_torch, every_case, follow, make

import optimjax as optim
from optimjax.interop import torch as interop

pytestmark = pytest.mark.usefixtures("folder")

BEFORE, AFTER = 23, 40


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """PyTorch warns where a sequence steps its schedulers with an epoch."""
    with warnings.catch_warnings(action="ignore"):
        yield


def pair(torch: Any, case: str) -> tuple[Any, Any, Any, Any]:
    """Optimizer and scheduler, PyTorch's and ours."""
    theirs, ours = build_torch(torch), build()
    return theirs, make(torch.optim.lr_scheduler, case)(theirs), ours, make(optim.lr_scheduler, case)(ours)


def assert_same_rates(theirs: Any, there: Any, ours: Any, here: Any) -> None:
    expected = np.array(follow(theirs, there, AFTER, first=BEFORE), float)
    np.testing.assert_allclose(follow(ours, here, AFTER, first=BEFORE), expected, rtol=1e-12)


@every_case
def test_a_schedule_of_pytorch_continues_here(case: str, torch: Any) -> None:
    theirs, there, ours, here = pair(torch, case)
    follow(theirs, there, BEFORE)
    torch.save({"optimizer": theirs.state_dict(), "scheduler": there.state_dict()}, "run.pt")
    if case == "lambda of numpy numbers":  # which PyTorch's own safe reading refuses, too
        with pytest.raises(ValueError, match=r"'run\.pt' asks for numpy\.\w+\.multiarray\.scalar"):
            interop.load("run.pt")
        saved = torch.load("run.pt", weights_only=False)
    else:
        saved = interop.load("run.pt")
    ours.load_state_dict(interop.from_torch(saved["optimizer"]))
    here.load_state_dict(saved["scheduler"])
    assert_same_rates(theirs, there, ours, here)


@every_case
def test_our_schedule_continues_in_pytorch(case: str, torch: Any) -> None:
    theirs, there, ours, here = pair(torch, case)
    follow(ours, here, BEFORE)
    states = {"optimizer": interop.to_torch(ours.state_dict(), tensors=False), "scheduler": here.state_dict()}
    interop.save("run.pt", states)
    saved = torch.load("run.pt", weights_only=True)
    theirs.load_state_dict(saved["optimizer"])
    there.load_state_dict(saved["scheduler"])
    assert_same_rates(theirs, there, ours, here)
