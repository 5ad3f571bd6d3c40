"""Processes over gloo: wrappers and meshes, modes across ranks, sharded checkpoints.

docs/sharding.md has a row for each wrapper here. One pair of processes runs all checks
that need two, and four processes those on meshes of two axes, since starting them takes
longer than the checks do. Each check is a test that reads its outcome.
"""

import os
import re
import traceback
import warnings
from datetime import timedelta
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.pipelining import PipelineStage, ScheduleGPipe
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)
from torch.nn.parallel import DistributedDataParallel
from torch_cases import same

import sf_torch
from sf_torch._step import fused

WORLD = 2
EVEN = 6  # rows of a layer that tensor parallelism can split
pytestmark = pytest.mark.xdist_group("torch-distributed")

BUILDS = {
    "sgd": lambda params: sf_torch.SGDScheduleFree(params, lr=0.1),
    "adamw": lambda params: sf_torch.AdamWScheduleFree(
        params, lr=0.05, weight_decay=0.1, warmup_steps=4, inner_momentum=0.5
    ),
    "stored": lambda params: sf_torch.AdamWScheduleFree(params, lr=0.05, store_x=True),
    "reference": lambda params: sf_torch.SGDScheduleFreeReference(params, lr=0.1),
    "wrapper": lambda params: sf_torch.ScheduleFreeWrapper(
        torch.optim.RMSprop(params, lr=0.01)
    ),
    "plus": lambda params, **options: sf_torch.AdamCScheduleFreePlus(
        params, weight_decay=1.0, polyak_beta=0.5, c_warmup=2, **options
    ),
}
if fused.works_on(torch.device("cpu")):  # in Triton's interpreter
    BUILDS["fused"] = lambda params: sf_torch.AdamWScheduleFree(
        params, lr=0.05, weight_decay=0.1, fused=True
    )


FAMILY = {
    "radam": lambda params: sf_torch.RAdamScheduleFree(
        params, lr=0.05, silent_sgd_phase=False
    ),
    "refined": lambda params: sf_torch.AdamWScheduleFreeRefined(
        params, lr=0.05, refined_c=20.0
    ),
    "gpa": lambda params: sf_torch.GPAAdamW(params, lr=0.05),
    "muon": lambda params: sf_torch.MuonScheduleFree(params, lr=0.05),
    "normuon": lambda params: sf_torch.MuonScheduleFree(params, lr=0.05, row_b2=0.95),
}
# In pipeline stages the sums of ScheduleFree+ need a group; it has a check of its own.
PLAIN = [name for name in BUILDS if name != "plus"]


def network(hidden=5):
    torch.manual_seed(0)
    # Rows that two processes cannot share evenly: 5 and 3.
    return torch.nn.Sequential(
        torch.nn.Linear(4, hidden), torch.nn.Tanh(), torch.nn.Linear(hidden, 3)
    )


def batch(seed):
    return torch.randn(8, 4, generator=torch.Generator().manual_seed(seed))


def train(model, optimizer, steps, start=0, rank=None, clip=None):
    """Of each batch every rank takes its part; all of it where there is no rank."""
    if hasattr(optimizer, "train"):
        optimizer.train()
    for seed in range(start, start + steps):
        inputs = batch(seed)
        if rank is not None:
            inputs = inputs.chunk(dist.get_world_size())[rank]
        optimizer.zero_grad()
        loss = model(inputs).square().mean()
        loss.backward()
        # Nothing tells ScheduleFree+ of DDP; without it, each keeps to itself.
        in_ddp = isinstance(model, DistributedDataParallel)
        value = sf_torch.mean_loss(loss) if in_ddp else loss.detach()
        if clip is not None:
            optimizer.tell(grad_norm=clip(model))
        optimizer.step(lambda value=value: value)


def full(tensor):
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def whole(tensors):
    return [full(tensor.detach()) for tensor in tensors]


def same_kinds(a, b):
    return [type(p) for p in a] == [type(p.data) for p in b]


def one_process(name, steps=6, hidden=5, clip=None):
    model = network(hidden)
    optimizer = BUILDS[name](model.parameters())
    train(model, optimizer, steps, clip=clip)
    return optimizer.eval_params()


def close(actual, expected):
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(full(a), b, rtol=1e-5, atol=1e-6)


# What both processes do


def ddp_trains_to_the_same_x(rank, folder):
    for name, build in BUILDS.items():
        model = DistributedDataParallel(network())
        optimizer = build(model.parameters())
        train(model, optimizer, 6, rank=rank)
        close(optimizer.eval_params(), one_process(name))


def sharded(name, mesh=None):
    model = network()
    fully_shard(model, mesh=mesh)
    return model, BUILDS[name](model.parameters())


def fsdp_trains_to_the_same_x(rank, folder):
    for name in BUILDS:
        model, optimizer = sharded(name)
        train(model, optimizer, 6, rank=rank)
        close(optimizer.eval_params(), one_process(name))


def fsdp_switches_modes(rank, folder):
    for name in BUILDS:
        model, optimizer = sharded(name)
        handle = sf_torch.follow(model, optimizer)
        train(model, optimizer, 4, rank=rank)
        y = [tensor.clone() for tensor in whole(model.parameters())]
        x = whole(optimizer.eval_params())
        state = optimizer.eval_state_dict(model)
        assert state.keys() == model.state_dict().keys()
        assert same_kinds(state.values(), model.parameters())
        model.eval()
        assert not optimizer.training
        if name == "fused":  # whose arithmetic is another kernel's
            close(whole(model.parameters()), x)
            x = whole(optimizer.eval_params())
            state = optimizer.eval_state_dict(model)
        assert same(whole(model.parameters()), x)
        assert same(whole(state.values()), x)
        model.train()
        assert same(whole(model.parameters()), y)
        handle.remove()


def launches_over_shards_last(rank, folder):
    if "fused" not in BUILDS:
        return
    model, optimizer = sharded("fused")
    train(model, optimizer, 2, rank=rank)
    (plan,) = optimizer._plans.values()
    train(model, optimizer, 2, rank=rank)
    assert [*optimizer._plans.values()] == [plan]


def a_shard_that_is_not_finite_is_skipped_everywhere(rank, folder):
    model = network()
    fully_shard(model)
    optimizer = sf_torch.SGDScheduleFree(model.parameters(), skip_nonfinite=True)
    train(model, optimizer, 2, rank=rank)
    before = [p.to_local().clone() for p in model.parameters()]
    if rank == 1:
        model[2].bias.grad.to_local()[0] = float("nan")
    optimizer.step()
    assert same([p.to_local() for p in model.parameters()], before)
    assert optimizer.param_groups[0]["k"] == 2


def state_is_sharded(rank, folder):
    model, optimizer = sharded("adamw")
    train(model, optimizer, 1, rank=rank)
    for p, state in optimizer.state.items():
        for value in filter(torch.is_tensor, state.values()):
            assert value.placements == p.placements
            assert value.to_local().shape == p.to_local().shape


def checkpoint_of(model, optimizer, options=None):
    model_state, optimizer_state = get_state_dict(model, optimizer, options=options)
    return {"model": model_state, "optimizer": optimizer_state}


def restore(path, model, optimizer, options=None):
    optimizer.train()
    state = checkpoint_of(model, optimizer, options)
    dcp.load(state, checkpoint_id=path)
    set_state_dict(
        model,
        optimizer,
        model_state_dict=state["model"],
        optim_state_dict=state["optimizer"],
        options=options,
    )


def sharded_checkpoints_resume(rank, folder):
    for name in BUILDS:
        path = os.path.join(folder, name)
        model, optimizer = sharded(name)
        train(model, optimizer, 4, rank=rank)
        dcp.save(checkpoint_of(model, optimizer), checkpoint_id=path)
        resumed = sharded(name)
        with torch.no_grad():
            for p in resumed[0].parameters():
                p.zero_()
        restore(path, *resumed)
        assert resumed[1].training
        for m, o in ((model, optimizer), resumed):
            train(m, o, 3, start=4, rank=rank)
        for a, b in zip(model.parameters(), resumed[0].parameters(), strict=True):
            assert torch.equal(a.to_local(), b.to_local())
        close(resumed[1].eval_params(), one_process(name, steps=7))


def a_whole_checkpoint_of_shards_serves_x(rank, folder):
    model, optimizer = sharded("adamw")
    train(model, optimizer, 6, rank=rank)
    options = StateDictOptions(full_state_dict=True)
    with optimizer.eval_mode():
        state, _ = get_state_dict(model, optimizer, options=options)
    if rank == 0:
        close(state.values(), one_process("adamw"))


def a_file_of_one_process_is_refused_for_shards(rank, folder):
    path = os.path.join(folder, "run.pt")
    model, optimizer = sharded("adamw")
    train(model, optimizer, 1, rank=rank)
    named = "sharded over processes: 0.weight, 0.bias, 2.weight, 2.bias"
    for refused in (
        lambda: sf_torch.save_checkpoint(path, model, optimizer),
        lambda: sf_torch.load_checkpoint(path, model, optimizer),
        lambda: sf_torch.record(optimizer, path, model=model),
    ):
        with pytest.raises(ValueError, match=named):
            refused()
    whole = network()
    with pytest.raises(ValueError, match=r"processes: extra\['shard'\]"):
        sf_torch.save_checkpoint(
            path, whole, BUILDS["sgd"](whole.parameters()), shard=model[0].weight
        )
    assert not os.path.exists(path)


def processes_that_write_one_file_do_not_mix(rank, folder):
    path = os.path.join(folder, "together.pt")
    model = network()
    optimizer = BUILDS["adamw"](model.parameters())
    train(model, optimizer, 1)
    for _ in range(10):
        sf_torch.save_checkpoint(path, model, optimizer)
        sf_torch.load_checkpoint(path, model, optimizer)
    dist.barrier()
    assert not [name for name in os.listdir(folder) if name.endswith(".part")]


def modes_agree(rank, folder):
    _, optimizer = sharded("sgd")
    sf_torch.check_modes(optimizer)
    optimizer.train()
    sf_torch.check_modes(optimizer)
    sf_torch.check_modes(optimizer, group=dist.new_group([0, 1]))


def a_rank_in_the_wrong_mode_is_named_on_every_rank(rank, folder):
    model = network()
    optimizer = BUILDS["sgd"](model.parameters())
    optimizer.train()
    if rank == 1:
        optimizer.eval()
    with pytest.raises(RuntimeError, match=r"ranks \[0\] .*train.* \[1\] in eval mode"):
        sf_torch.check_modes(optimizer)


def clipped(model):
    return torch.nn.utils.clip_grad_norm_(model.parameters(), 0.05)


def clipped_shards_take_the_step_of_whole_gradients(rank, folder):
    model, optimizer = sharded("plus")
    train(model, optimizer, 6, rank=rank, clip=clipped)
    close(optimizer.eval_params(), one_process("plus", clip=clipped))


def sums_go_over_the_parts_of_fsdp1(rank, folder):
    for originals, clip in ((False, None), (True, None), (False, clipped)):
        model = FullyShardedDataParallel(
            network(), use_orig_params=originals, device_id=torch.device("cpu")
        )
        with pytest.raises(ValueError, match="Pass process_group="):
            BUILDS["plus"](model.parameters())
        optimizer = BUILDS["plus"](model.parameters(), process_group=dist.group.WORLD)
        own = clip and (lambda model: model.clip_grad_norm_(0.05))
        train(model, optimizer, 6, rank=rank, clip=own)
        optimizer.eval()
        with FullyShardedDataParallel.summon_full_params(model):
            layers = model.module[0], model.module[2]
            x = [p.detach().clone() for m in layers for p in (m.weight, m.bias)]
        close(x, one_process("plus", clip=clip))


def sums_go_over_the_partitions_of_zero(rank, folder):
    # Which imports the deprecated torch.jit of its own package.
    from torch.distributed.optim import ZeroRedundancyOptimizer

    model = DistributedDataParallel(network())
    make = partial(BUILDS["plus"], process_group=dist.group.WORLD)
    optimizer = ZeroRedundancyOptimizer(model.parameters(), make)
    optimizer.optim.train()
    for outer, inner in zip(
        optimizer.param_groups, optimizer.optim.param_groups, strict=True
    ):
        outer["train_mode"] = inner["train_mode"]
    train(model, optimizer, 6, rank=rank)
    x = dict(zip(model.parameters(), one_process("plus"), strict=True))
    own = [p for group in optimizer.optim.param_groups for p in group["params"]]
    assert 0 < len(own) < len(x)
    close(optimizer.optim.eval_params(), [x[p] for p in own])


def sums_go_over_pipeline_stages(rank, folder):
    stage = network()[:2] if rank == 0 else network()[2:]
    optimizer = BUILDS["plus"](stage.parameters(), process_group=dist.group.WORLD)
    optimizer.train()
    for seed in range(6):
        optimizer.zero_grad()
        loss, slope = torch.zeros(()), torch.empty(8, 5)
        if rank == 0:
            generator = torch.Generator().manual_seed(seed)
            hidden = stage(torch.randn(8, 4, generator=generator))
            dist.send(hidden.detach(), 1)
            dist.recv(slope, 1)
            hidden.backward(slope)
        else:
            hidden = torch.empty(8, 5)
            dist.recv(hidden, 0)
            loss = stage(hidden.requires_grad_()).square().mean()
            loss.backward()
            dist.send(hidden.grad, 0)
        loss = loss.detach()
        dist.broadcast(loss, 1)
        optimizer.step_func(function_value=loss)
    close(optimizer.eval_params(), one_process("plus")[2 * rank :][:2])


def models_without_shards_keep_to_themselves(rank, folder):
    if rank == 0:  # which would wait for ever for the other
        alone = one_process("plus", steps=3)
    model = network()
    optimizer = BUILDS["plus"](model.parameters())
    train(model, optimizer, 3, start=100 * rank)
    if rank == 0:
        assert same(optimizer.eval_params(), alone)


def a_loss_of_one_replica_is_pointed_out(rank, folder):
    model = network()
    optimizer = BUILDS["plus"](model.parameters())
    optimizer.train()
    loss = model(torch.ones(1, 4)).square().mean()
    loss.backward()
    with pytest.warns(UserWarning, match="2 processes.*mean_loss"):
        optimizer.step_func(function_value=loss)
    optimizer.step_func(function_value=loss)  # once


def fsdp1_trains_to_the_same_x_and_switches_modes(rank, folder):
    for name in ("sgd", "adamw", "stored", "reference", "wrapper"):
        model = FullyShardedDataParallel(
            network(), device_id=torch.device("cpu"), use_orig_params=True
        )
        optimizer = BUILDS[name](model.parameters())
        train(model, optimizer, 6, rank=rank)
        with optimizer.eval_mode(), FullyShardedDataParallel.summon_full_params(model):
            close([p.detach() for p in model.parameters()], one_process(name))


def muon_refuses_the_parts_of_fsdp1(rank, folder):
    for originals in (False, True):
        model = FullyShardedDataParallel(
            network(), device_id=torch.device("cpu"), use_orig_params=originals
        )
        for params in (model.parameters(), [{"params": model.named_parameters()}]):
            with pytest.raises(ValueError, match=r"Use fully_shard \(FSDP2\)"):
                sf_torch.MuonScheduleFree(params)


def tensor_parallel_trains_to_the_same_x(rank, folder):
    mesh = init_device_mesh("cpu", (WORLD,))
    for name in BUILDS:
        model = parallel(mesh)
        optimizer = BUILDS[name](model.parameters())
        train(model, optimizer, 6)
        close(optimizer.eval_params(), one_process(name, hidden=EVEN))
        with optimizer.eval_mode():
            close(whole(model.parameters()), one_process(name, hidden=EVEN))


def parallel(mesh):
    """The network, its first layer split by rows and its last by columns."""
    return parallelize_module(
        network(EVEN), mesh, {"0": ColwiseParallel(), "2": RowwiseParallel()}
    )


def pipeline_stages_train_to_the_same_x(rank, folder):
    for name in PLAIN:
        layers = network()
        mine = torch.nn.Sequential(*(layers[:2], layers[2:])[rank])
        stage = PipelineStage(mine, rank, WORLD, torch.device("cpu"))
        schedule = ScheduleGPipe(stage, 2, lambda out, _: out.square().mean())
        optimizer = BUILDS[name](mine.parameters())
        optimizer.train()
        for seed in range(6):
            optimizer.zero_grad()
            if rank == 0:
                schedule.step(batch(seed))
            else:
                schedule.step(target=torch.zeros(8))
            optimizer.step()
        expected = one_process(name)
        close(optimizer.eval_params(), (expected[:2], expected[2:])[rank])


def flattened_checkpoints_resume(rank, folder):
    options = StateDictOptions(flatten_optimizer_state_dict=True)
    for name in ("adamw", "reference", "wrapper"):
        path = os.path.join(folder, f"flat-{name}")
        model, optimizer = sharded(name)
        train(model, optimizer, 4, rank=rank)
        dcp.save(checkpoint_of(model, optimizer, options), checkpoint_id=path)
        resumed = sharded(name)
        restore(path, *resumed, options)
        for m, o in ((model, optimizer), resumed):
            train(m, o, 3, start=4, rank=rank)
        for a, b in zip(model.parameters(), resumed[0].parameters(), strict=True):
            assert torch.equal(a.to_local(), b.to_local())


def modes_in_a_group_of_others_are_refused(rank, folder):
    group = dist.new_group([0])
    _, optimizer = sharded("sgd")
    if rank == 0:
        sf_torch.check_modes(optimizer, group)
        return
    with pytest.raises(ValueError, match="rank 1 is not in the process group"):
        sf_torch.check_modes(optimizer, group)


def zero_redundancy_optimizers_switch_as_documented(rank, folder):
    namespace = {}
    exec(documented("ZeroRedundancyOptimizer"), namespace)
    for kind, options in (
        (sf_torch.SGDScheduleFree, {"lr": 0.1}),
        (sf_torch.AdamWScheduleFree, {"lr": 0.05, "weight_decay": 0.1}),
        (sf_torch.RAdamScheduleFree, {"lr": 0.05, "silent_sgd_phase": False}),
    ):
        model = DistributedDataParallel(network())
        optimizer = namespace["Zero"](model.parameters(), kind, **options)
        train(model, optimizer, 6, rank=rank)
        y = [p.detach().clone() for p in model.parameters()]
        alone = network()
        expected = kind(alone.parameters(), **options)
        train(alone, expected, 6)
        optimizer.eval()
        close([p.detach() for p in model.parameters()], expected.eval_params())
        with pytest.raises(RuntimeError, match="needs train mode"):
            optimizer.step()
        optimizer.train()
        assert same([p.detach() for p in model.parameters()], y)
        train(model, optimizer, 2, start=6, rank=rank)
        train(alone, expected, 2, start=6)
        close([p.detach() for p in model.parameters()], list(alone.parameters()))


def the_family_trains_to_the_same_x(rank, folder):
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    for build in FAMILY.values():
        alone = network()
        expected = build(alone.parameters())
        train(alone, expected, 6)
        replicated, shards = DistributedDataParallel(network()), network()
        fully_shard(shards, mesh=mesh)
        for model in (replicated, shards):
            optimizer = build(model.parameters())
            train(model, optimizer, 6, rank=rank)
            close(optimizer.eval_params(), expected.eval_params())


def hsdp_trains_to_the_same_x_and_resumes(rank, folder):
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    for name in BUILDS:
        path = os.path.join(folder, f"hsdp-{name}")
        model, optimizer = sharded(name, mesh)
        train(model, optimizer, 4, rank=rank)
        dcp.save(checkpoint_of(model, optimizer), checkpoint_id=path)
        resumed = sharded(name, mesh)
        restore(path, *resumed)
        train(*resumed, 3, start=4, rank=rank)
        close(resumed[1].eval_params(), one_process(name, steps=7))


def tensor_parallel_under_fsdp_trains_to_the_same_x(rank, folder):
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    for name in BUILDS:
        model = parallel(mesh["tensor"])
        fully_shard(model, mesh=mesh["data"])
        optimizer = BUILDS[name](model.parameters())
        optimizer.train()
        for seed in range(6):
            optimizer.zero_grad()
            inputs = batch(seed).chunk(2)[mesh.get_local_rank("data")]
            loss = model(inputs).square().mean()
            loss.backward()
            optimizer.step(loss.detach)
        close(optimizer.eval_params(), one_process(name, hidden=EVEN))
        with optimizer.eval_mode():
            close(whole(model.parameters()), one_process(name, hidden=EVEN))


def documented(name):
    """The block of code about it in the documentation."""
    page = Path(__file__).parents[2] / "docs" / "howto" / "ddp-fsdp.md"
    blocks = re.findall(r"^```python\n(.*?)^```$", page.read_text(), re.M | re.S)
    (block,) = [block for block in blocks if name in block]
    return block


CHECKS = [
    clipped_shards_take_the_step_of_whole_gradients,
    sums_go_over_the_parts_of_fsdp1,
    sums_go_over_the_partitions_of_zero,
    sums_go_over_pipeline_stages,
    models_without_shards_keep_to_themselves,
    a_loss_of_one_replica_is_pointed_out,
    ddp_trains_to_the_same_x,
    fsdp_trains_to_the_same_x,
    fsdp_switches_modes,
    launches_over_shards_last,
    a_shard_that_is_not_finite_is_skipped_everywhere,
    state_is_sharded,
    sharded_checkpoints_resume,
    a_whole_checkpoint_of_shards_serves_x,
    a_file_of_one_process_is_refused_for_shards,
    processes_that_write_one_file_do_not_mix,
    modes_agree,
    a_rank_in_the_wrong_mode_is_named_on_every_rank,
    modes_in_a_group_of_others_are_refused,
    flattened_checkpoints_resume,
    fsdp1_trains_to_the_same_x_and_switches_modes,
    muon_refuses_the_parts_of_fsdp1,
    tensor_parallel_trains_to_the_same_x,
    pipeline_stages_train_to_the_same_x,
    zero_redundancy_optimizers_switch_as_documented,
]
IN_FOUR = [
    the_family_trains_to_the_same_x,
    hsdp_trains_to_the_same_x_and_resumes,
    tensor_parallel_under_fsdp_trains_to_the_same_x,
]


def process(rank, checks, world, folder, outcomes):
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=world,
        timeout=timedelta(seconds=120),
    )
    warnings.filterwarnings("error", message="there are .* processes")
    for check in checks:
        try:
            check(rank, folder)
            outcomes.put((check.__name__, rank, None))
        except BaseException:
            outcomes.put((check.__name__, rank, traceback.format_exc()))
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def group(tmp_path_factory):
    """The folder that two processes left, and what became of each check."""
    return outcomes_of(CHECKS, WORLD, tmp_path_factory)


@pytest.fixture(scope="module")
def four(tmp_path_factory):
    return outcomes_of(IN_FOUR, 4, tmp_path_factory)


def outcomes_of(checks, world, tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("distributed"))
    context = torch.multiprocessing.get_context("spawn")
    outcomes = context.SimpleQueue()
    torch.multiprocessing.spawn(
        process, args=(checks, world, folder, outcomes), nprocs=world
    )
    results = {}
    while not outcomes.empty():
        name, rank, error = outcomes.get()
        results[name, rank] = error
    return folder, results


@pytest.mark.parametrize("rank", range(WORLD))
@pytest.mark.parametrize("check", [check.__name__ for check in CHECKS])
def test_in_two_processes(group, check, rank):
    error = group[1][check, rank]
    assert error is None, f"in process {rank}:\n{error}"


@pytest.mark.slow  # four processes
@pytest.mark.parametrize("rank", range(4))
@pytest.mark.parametrize("check", [check.__name__ for check in IN_FOUR])
def test_in_four_processes(four, check, rank):
    error = four[1][check, rank]
    assert error is None, f"in process {rank}:\n{error}"


# PyTorch says that it loads in a single process, which is what the test is about.
@pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")
@pytest.mark.parametrize("name", BUILDS)
def test_a_checkpoint_of_two_processes_continues_in_one(group, name):
    folder, results = group
    assert results["sharded_checkpoints_resume", 0] is None
    model = network()
    optimizer = BUILDS[name](model.parameters())
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    restore(os.path.join(folder, name), model, optimizer)
    train(model, optimizer, 3, start=4)
    close(optimizer.eval_params(), one_process(name, steps=7))


def test_modes_of_a_single_process_agree():
    sf_torch.check_modes(BUILDS["sgd"](network().parameters()))
