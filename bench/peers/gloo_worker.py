"""One process of PyTorch's gloo under measurement, in PyTorch's own interpreter.

python gloo_worker.py CONTROL BARRIER RANK WORKERS RENDEZVOUS_FILE
"""

import sys

import torch
import torch.distributed as dist
from member import Member, Round

BUCKET_BYTES = 25 << 20  # as DistributedDataParallel makes them


def buckets_of(tensors):
    """Runs of tensors of about the size of a bucket, the last tensors first, as DDP orders them."""
    buckets, size = [[]], 0
    for tensor in reversed(tensors):
        if buckets[-1] and size + 4 * tensor.numel() > BUCKET_BYTES:
            buckets.append([])
            size = 0
        buckets[-1].append(tensor)
        size += 4 * tensor.numel()
    return [(bucket, torch.empty(sum(t.numel() for t in bucket))) for bucket in buckets]


def make(case, workers):
    tensors = [torch.ones(tuple(shape)) for shape in case["shapes"]]
    buckets = buckets_of(tensors) if case["operation"] == "buckets" else []

    def fill():
        for tensor in tensors:
            tensor.fill_(1)

    def reduce_buckets():
        works = []
        for bucket, flat in buckets:
            torch.cat([tensor.view(-1) for tensor in bucket], out=flat)
            works.append(dist.all_reduce(flat, async_op=True))
        for (bucket, flat), work in zip(buckets, works, strict=True):
            work.wait()
            for tensor, part in zip(bucket, flat.split([t.numel() for t in bucket]), strict=True):
                tensor.view(-1).copy_(part)

    def reduce_each():
        for work in [dist.all_reduce(tensor, async_op=True) for tensor in tensors]:
            work.wait()

    def check():
        for tensor in tensors:
            if float(tensor.view(-1)[0]) != workers:
                raise ValueError(f"wrong result: {float(tensor.view(-1)[0])}")

    return Round(fill, reduce_buckets if buckets else reduce_each, check)


def main(control, barrier, rank, workers, rendezvous):
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=int(rank), world_size=int(workers))
    member = Member(control, barrier, int(rank), int(workers))
    member.serve(lambda case: make(case, int(workers)), version=torch.__version__)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
