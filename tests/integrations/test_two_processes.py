"""ScheduleFree+ in trainers of two processes, which accumulate and clip.

Each process takes a row of four at a time, and a step is of two of them: together the
four rows of a step of the bare loop.
"""

import os
import socket

import pytest
import test_accelerate_modes
import test_huggingface
import test_lightning_modes
import torch
from torch_cases import values
from trainer_runs import BUILDS, CLIP, INPUTS, bare_loop, close

pytestmark = [
    pytest.mark.slow,  # two more processes import each trainer
    pytest.mark.xdist_group("trainers"),
]


def by_accelerate(folder):
    return test_accelerate_modes.clipped_run(1, accumulate=2)


def by_hugging_face(folder):
    trainer, _ = test_huggingface.hugging_face_run(
        BUILDS["plus"],
        folder,
        num_train_epochs=2,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=2,
        max_grad_norm=CLIP,
        ddp_backend="gloo",
    )
    trainer.train()
    return values(trainer.model)


def by_lightning(folder):
    return test_lightning_modes.clipped_run(
        folder,
        batch_size=1,
        sampler=range(int(os.environ["RANK"]), len(INPUTS), 2),
        accumulate_grad_batches=2,
        devices=2,
        strategy="ddp",
        use_distributed_sampler=False,  # it shuffles
    )


RUNS = {run.__name__: run for run in (by_accelerate, by_hugging_face, by_lightning)}


def process(rank, port, name, folder):
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
        "GROUP_RANK": "0",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_RUN_ID": "test",  # by which Lightning knows its launcher
    }
    torch.set_num_threads(1)
    x, _ = bare_loop(BUILDS["plus"], epochs=2, clip=CLIP)
    close(RUNS[name](folder), x)


@pytest.mark.parametrize("name", RUNS)
def test_two_processes_train_as_one(name, tmp_path):
    module = {"by_accelerate": "accelerate", "by_hugging_face": "transformers"}
    pytest.importorskip(module.get(name, "pytorch_lightning"))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(process, (port, name, str(tmp_path)), nprocs=2)
