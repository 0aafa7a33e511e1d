"""Processes that fill a cache of teacher logits: two together, and one that is killed."""

import json
import os
import signal
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch

from nlpxfer.checkpoint import load_teacher
from nlpxfer.data.schema import LabelSchema
from nlpxfer.train import teacher_cache


def ask_together(rank, folder, model, texts, labels):
    """Write the logits to `<folder>-<rank>.npy`, and how many rows went through this process's model."""
    meeting = torch.distributed.FileStore(f"{folder}-store", 2)
    torch.distributed.init_process_group("gloo", store=meeting, rank=rank, world_size=2, timeout=timedelta(seconds=60))
    teacher_cache.PART_ROWS = 16
    teacher = load_teacher(model, schema=LabelSchema(tuple(labels)))
    rows = []
    teacher.model.register_forward_hook(lambda module, inputs, output: rows.append(len(output.logits)))
    logits, facts = teacher_cache.teacher_logits(
        teacher, texts, labels=labels, max_length=32, batch_size=4, folder=folder
    )
    Path(f"{folder}-{rank}.json").write_text(json.dumps({"forward": sum(rows), **facts}))
    np.save(f"{folder}-{rank}.npy", logits)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def die_in_the_third_part(folder, identity, keys):
    """Fill two parts of a cache, and be killed as a machine kills: nothing can be tidied up."""
    calls = []

    def compute(rows):
        calls.append(rows)
        if len(calls) == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        return np.ones((len(rows), 3), dtype=np.float32)

    teacher_cache.PART_ROWS = 6
    teacher_cache.cached_logits(folder, identity, keys, compute)
