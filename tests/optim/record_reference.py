"""Write reference.json: what PyTorch's optimizers make of fixed gradients. Needs PyTorch; the tests do not.

Run ``python -m tests.optim.record_reference`` where ``torch`` is installed.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch

from tests.optim.cases import CASES, STEPS

TORCH_NAMES = {"RMSProp": "RMSprop"}


def main() -> None:
    rng = np.random.default_rng(0)
    weights, gradients = rng.standard_normal(5), rng.standard_normal((STEPS, 5))
    results = []
    for name, options in CASES:
        parameter = torch.nn.Parameter(torch.tensor(weights, dtype=torch.float64))
        given = {k: tuple(v) if isinstance(v, list) else v for k, v in options.items()}
        rule = getattr(torch.optim, TORCH_NAMES.get(name, name))([parameter], **given)
        steps = []
        for gradient in gradients:
            parameter.grad = torch.tensor(gradient)
            rule.step()
            steps.append(parameter.detach().tolist())
        results.append({"name": name, "options": options, "steps": steps})
    recorded = {
        "torch": torch.__version__,
        "weights": weights.tolist(),
        "gradients": gradients.tolist(),
        "results": results,
    }
    Path(__file__).with_name("reference.json").write_text(json.dumps(recorded, indent=1) + "\n")


if __name__ == "__main__":
    main()
