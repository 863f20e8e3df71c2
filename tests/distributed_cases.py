"""What two processes run in the tests of distributed training; started by torchrun or accelerate."""

import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor


def build(folder: Path, recipe: Path) -> Any:
    """A trainer for `recipe` that writes to `folder`."""
    from bard_vl.training import merge_blocks
    from bard_vl.training.arguments import parse_recipe
    from bard_vl.training.stages import Run, Stage, build_trainer

    model, data, args, _ = parse_recipe(merge_blocks.RECIPE, [str(recipe), "--output_dir", str(folder)])
    stage = Stage(Path(model.model_name_or_path), 4, folder / "block-4")
    return build_trainer(Run(model, data, args), stage, args)


def sharded_steps(folder: str, recipe: str) -> None:
    """Train a model under `fully_shard` for the recipe's steps, on the trainer's batches, loss and optimizer."""
    torch.set_num_threads(1)
    trainer = build(Path(folder), Path(recipe))  # initialises the processes' group
    model = trainer.model
    mesh = dist.init_device_mesh("cpu", (dist.get_world_size(),))
    text, vision = model.model.language_model, model.model.visual
    for block in (*text.layers, *vision.blocks):
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    register_fsdp_forward_method(model, "generate")
    kinds = {type(parameter.data) for parameter in model.parameters()}
    optimizer = trainer.create_optimizer()
    batches = iter(trainer.get_train_dataloader())
    losses = []
    model.train()
    for _ in range(trainer.args.max_steps):
        micro, normaliser = trainer.get_batch_samples(batches, trainer.args.gradient_accumulation_steps, "cpu")
        total = torch.zeros(())
        for batch in micro:
            loss = trainer.compute_loss(model, batch, num_items_in_batch=normaliser)
            loss.backward()
            total += loss.detach()
        dist.all_reduce(total)
        losses.append(total.item() / dist.get_world_size())
        optimizer.step()
        optimizer.zero_grad()
        trainer.state.global_step += 1
    whole = {name: parameter.full_tensor() for name, parameter in model.named_parameters()}
    samples = [trainer.train_dataset[number] for number in range(2)]
    decoded = trainer.decoding_scores(model.eval(), samples).tolist()
    if dist.get_rank() == 0:
        torch.save(whole, Path(folder) / "weights.pt")
        found = {"all_sharded": kinds == {DTensor}, "losses": losses, "decoded": decoded}
        (Path(folder) / "sharded.json").write_text(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    sharded_steps(*sys.argv[1:])
