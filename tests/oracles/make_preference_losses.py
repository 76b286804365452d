"""Writes preference_losses.npz: losses of pairs and their slopes as TRL's own trainers compute them.

Run where trl and torch are installed: ``python tests/oracles/make_preference_losses.py``. The trainers are not built:
their functions run on a stand-in that holds the options, and on a model whose log-probabilities are the given ones.
"""

from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

BETAS = (0.05, 0.3, 2.0)
DPO = {
    "sigmoid": {},
    "hinge": {},
    "ipo": {},
    "exo_pair": {"label_smoothing": 0.05},
    "nca_pair": {},
    "robust": {"label_smoothing": 0.1},
    "bco_pair": {},
    "sppo_hard": {},
    "apo_zero": {},
    "apo_down": {},
    "discopop": {"discopop_tau": 0.2},
    "sft": {},
    "sigmoid_norm": {},
}
"""Loss of DPOTrainer -> options that differ from its defaults."""
CPO = {"sigmoid": {"label_smoothing": 0.2}, "simpo": {"simpo_gamma": 0.7, "label_smoothing": 0.1}}
KL = 0.6


class Accelerator:
    """One process."""

    device = "cpu"

    def gather(self, x):
        return x

    gather_for_metrics = gather


def stand_in(**options) -> Any:
    """A trainer as its loss sees it: sums of float64 over tokens, a reference computed before."""
    known = {
        "accelerator": Accelerator(),
        "model": SimpleNamespace(training=True),
        "aux_loss_enabled": False,
        "precompute_ref_logps": True,
        "f_divergence_type": "reverse_kl",
        "ld_alpha": None,
        "use_weighting": False,
        "label_smoothing": 0.0,
        "loss_weights": [1.0],
        "alpha": 0.0,
        "args": SimpleNamespace(discopop_tau=options.pop("discopop_tau", 0.05)),
        "_metrics": defaultdict(lambda: defaultdict(list)),
        "_total_train_tokens": 0,
        "_tp_size": 1,
    }
    return SimpleNamespace(**known | options)


def batch_of(lengths):
    """Rows of a token of prompt, then those of a response."""
    import torch

    columns = torch.arange(1 + int(lengths.max()))[None]
    mask = ((columns >= 1) & (columns <= torch.tensor(lengths)[:, None])).long()
    ones = torch.ones_like(mask)
    return {"input_ids": 0 * ones, "attention_mask": ones, "completion_mask": mask}


def model_of(x, mask):
    """A model that spreads the log-probability of a response evenly over its tokens."""
    import torch

    spread = mask[:, 1:].double() / mask.sum(dim=1, keepdim=True)
    zeros = torch.zeros_like(spread)
    outputs = SimpleNamespace(
        log_probs=x[:, None] * spread, entropy=zeros, mean_logits=zeros, is_top1=zeros.bool(), aux_loss=None
    )
    return lambda **_: outputs


def dpo(name, x, reference, lengths, beta):
    from trl.trainer.dpo_trainer import DPOTrainer

    trainer = stand_in(loss_types=[name], beta=beta, **DPO[name])
    batch = batch_of(lengths)
    given = {"ref_chosen_logps": reference[:1], "ref_rejected_logps": reference[1:]}
    return DPOTrainer._compute_loss(trainer, model_of(x, batch["completion_mask"]), batch | given, False)


def kto(x, reference, lengths, beta):
    """Twice the mean over the two responses; the KL comes from a batch of its own."""
    import torch
    from trl.trainer.kto_trainer import KTOTrainer

    batch = batch_of(lengths)
    trainer = stand_in(
        loss_type="kto", beta=beta, desirable_weight=1.3, undesirable_weight=0.8, calculate_KL=True,
        _compute_kl_logps=lambda model, batch: torch.full((2,), KL, dtype=torch.float64),
    )  # fmt: skip
    given = {"label": torch.tensor([True, False]), "ref_logps": reference, "ref_KL_logps": torch.zeros(2).double()}
    return 2 * KTOTrainer._compute_loss(trainer, model_of(x, batch["completion_mask"]), batch | given, False)


def cpo(name, x, lengths, beta):
    import torch
    from trl.experimental.cpo import CPOTrainer

    per_token = name == "simpo"  # its trainer averages log-probabilities for this loss
    x = x / torch.tensor(lengths) if per_token else x
    return CPOTrainer.cpo_loss(stand_in(loss_type=name, beta=beta, **CPO[name]), x[:1], x[1:])[0].sum()


def orpo(x, lengths, beta):
    """The odds ratio's part; what the trainer adds is a mean over the tokens of a batch, prompts included."""
    import torch
    from trl.experimental.orpo import ORPOTrainer

    mean = x / torch.tensor(lengths)
    return -ORPOTrainer.odds_ratio_loss(stand_in(beta=beta), mean[:1], mean[1:])[0].sum()


def make() -> dict[str, Any]:
    import torch
    import trl

    draw = np.random.default_rng(0)
    x = -draw.gamma(2.0, 4.0, size=(16, 2))
    made = {"x": x, "reference": x + draw.normal(scale=3.0, size=x.shape), "lengths": draw.integers(1, 9, size=x.shape)}
    losses = {f"dpo/{name}": lambda *a, name=name: dpo(name, *a) for name in DPO}
    losses |= {f"cpo/{name}": lambda x, _, *a, name=name: cpo(name, x, *a) for name in CPO}
    losses |= {"kto/kto": kto, "orpo/orpo": lambda x, _, *a: orpo(x, *a)}
    for name, loss in losses.items():
        for beta in BETAS:
            values, slopes = [], []
            for row, reference, lengths in zip(x, made["reference"], made["lengths"], strict=True):
                leaf = torch.tensor(row, requires_grad=True)
                value = loss(leaf, torch.tensor(reference), lengths, beta)
                slopes.append(torch.autograd.grad(value, leaf)[0].numpy())
                values.append(value.item())
            made[f"{name}/{beta}/loss"], made[f"{name}/{beta}/slopes"] = np.array(values), np.array(slopes)
    return made | {"made_with": np.array(f"trl {trl.__version__}, torch {torch.__version__}")}


if __name__ == "__main__":
    np.savez_compressed(Path(__file__).parent / "preference_losses.npz", **make())
