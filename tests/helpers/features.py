"""Rows as the Trainer of transformers is given them, and the first gradients that it makes of them."""

import torch
from transformers import TrainingArguments

from helpers.tiny import fill_adapter, tiny_model
from remix_cli.core.config import AdapterConfig
from remix_cli.integrations import RemixTrainer, RouterTraining, get_remix_model

CONFIG = AdapterConfig(pool_size=4, active=2, rank=3, router_init_std=1.0)
ROUTER = RouterTraining(estimator="rtg", learning_rate=0.1)


def feature_rows(count: int = 16) -> list[dict]:
    """Rows of two lengths, padded on the right, the first four tokens a prompt."""
    generator = torch.Generator().manual_seed(0)
    made = []
    for i in range(count):
        length = 9 + 3 * (i % 2)
        ids = torch.randint(1, 60, (length,), generator=generator).tolist()
        padding = 12 - length
        made.append(
            {
                "input_ids": ids + [0] * padding,
                "attention_mask": [1] * length + [0] * padding,
                "labels": [-100] * 4 + ids[4:] + [-100] * padding,
            }
        )
    return made


def collate_features(features: list[dict]) -> dict[str, torch.Tensor]:
    return {name: torch.tensor([feature[name] for feature in features]) for name in features[0]}


class InOrder(RemixTrainer):
    """Takes the rows as they come, as the loops that it is compared with."""

    def _get_train_sampler(self, *_):
        return torch.utils.data.SequentialSampler(self.train_dataset)


class Stops(Exception):
    pass


class FirstGradients(InOrder):
    """Keeps the gradients of the first step, before they are clipped."""

    gradients: dict[str, torch.Tensor]

    def _clip_grad_norm(self, model):
        self.gradients = {name: p.grad.clone() for name, p in self.remix.adapter.parameters().items()}
        raise Stops


def trainer_of(folder, *, kind=InOrder, model=None, config=CONFIG, router=ROUTER, data=None, seed=0, **changes):
    data = feature_rows() if data is None else data
    settings = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 4,
        "max_steps": 4,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "save_steps": 2,
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "seed": seed,
    }
    adapted = get_remix_model(tiny_model() if model is None else model, config, seed=0)
    return kind(
        adapted,
        TrainingArguments(**(settings | changes)),
        router=router,
        train_dataset=data,
        eval_dataset=data[:4],
        data_collator=collate_features,
    )


def gradients_of_trainer(folder, **options) -> dict[str, torch.Tensor]:
    """Of an adapter whose every part matters, as B = 0 would not have it; in float64."""
    trainer = trainer_of(folder, kind=FirstGradients, **({"model": tiny_model(dtype=torch.float64)} | options))
    fill_adapter(trainer.remix.adapter)
    try:
        trainer.train()
    except Stops:
        return trainer.gradients
    raise AssertionError("no step was made")
