"""SRLoRA beyond the golden trajectories: schedule, starts, exhaustion, export rank, and the task it is made for."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from toys import Toy, adamw, adapted, config, inputs, train, view, views

from loratlas import AtlasLoraConfig, SRLoraConfig, UserError, attach
from loratlas.adapters.srlora import GRADIENT as GRADIENT_PRESET
from loratlas.adapters.srlora import SRLora
from loratlas.catalog import baselines
from loratlas.engine import sketch
from loratlas.engine.events import Plan
from loratlas.engine.factors import accumulate
from loratlas.engine.layer import joined_factors
from loratlas.engine.lifecycle import StepContext

PLANS = {
    # r, r_target, gamma, steps, schedule: r', events, interval
    (8, 32, 0.5, 700, "spread"): (4, 6, 100),
    (8, 32, 0.5, 600, "paper"): (4, 6, 100),
    (8, 32, 0.5, 5, "spread"): (4, 6, 1),
    (8, 30, 0.5, 600, "spread"): (4, 5, 100),
    (100, 200, 0.29, 1000, "paper"): (29, 3, 333),
    (8, 32, 0.01, 2500, "spread"): (1, 24, 100),
    (8, 32, 1.0, 400, "spread"): (8, 3, 100),
    (8, 8, 0.5, 400, "spread"): (4, 0, 0),
    (8, 11, 0.5, 400, "spread"): (4, 0, 0),
    (8, 32, 0.0, 400, "spread"): (0, 0, 0),
    (8, 32, 0.5, 0, "spread"): (4, 0, 0),
}


@pytest.mark.parametrize("given", PLANS)
def test_the_plan(given: tuple[int, int, float, int, str]) -> None:
    assert tuple(Plan.of(*given)) == PLANS[given]


def test_events_fall_on_multiples_of_the_interval_and_never_on_the_last_step() -> None:
    for schedule, steps in (("paper", [5, 10, 15]), ("spread", [4, 8, 12, 16])):
        model = adapted("srlora", schedule=schedule)
        train(model, inputs(), steps=20)
        for t in views(model):
            assert sorted(set(t.log[:, 0].tolist())) == steps


def test_directions_are_those_of_w_in_order_and_never_repeat() -> None:
    model = adapted("srlora", dtype=torch.float64)
    train(model, inputs(dtype=torch.float64), steps=20)
    for t in views(model):
        u, s, vh = torch.linalg.svd(t.layer.base_matrix(), full_matrices=False)
        assert t.log[:, 3].tolist() == list(range(4, 12))
        assert sorted([*t.log[:, 2].tolist(), *t.slot_dir.tolist()]) == list(range(12))
        for slot, direction in enumerate(t.slot_dir.tolist()):
            pair = torch.outer(t.B0[:, slot], t.A0[slot])
            expected = s[direction] * torch.outer(u[:, direction], vh[direction])
            torch.testing.assert_close(pair, expected, rtol=1e-9, atol=1e-9)


def test_the_lowest_scores_go_and_ties_go_to_the_lower_slot() -> None:
    t = view(adapted("srlora"))
    method = t.layer.method
    assert method.lowest(t, 2).tolist() == [0, 1]
    for name, wide in (("IA", 0), ("QA", 0), ("IB", 1), ("QB", 1)):
        getattr(t, name).copy_(torch.tensor([3.0, 1.0, 4.0, 1.0]).unsqueeze(1 - wide))
    assert method.lowest(t, 2).tolist() == [1, 3]
    assert method.lowest(t, 3).tolist() == [0, 1, 3]


@pytest.mark.parametrize("score_reset", ["all", "replaced"])
def test_scores_are_forgotten_as_asked(score_reset: str) -> None:
    model, x = adapted("srlora", score_reset=score_reset), inputs()
    train(model, x, steps=4, total=20)
    t = view(model)
    replaced = set(t.log[:, 1].tolist())
    assert len(replaced) == 2
    for slot in range(4):
        gone = [float(t.IA[slot].abs().sum()), float(t.IB[:, slot].abs().sum())] == [0.0, 0.0]
        assert gone == (score_reset == "all" or slot in replaced)


def low_rank_model(rank: int, **options: object) -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(12, 16, bias=False))
    net[0].weight.data = torch.randn(16, rank) @ torch.randn(rank, 12)
    return get_peft_model(net, SRLoraConfig(target_modules=["0"], **options))


def regress(model: nn.Module, steps: int) -> None:
    optimizer, x = adamw(model), inputs()
    attach(model, optimizer, total_steps=steps)
    for _ in range(steps):
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def test_events_stop_when_a_layer_has_no_direction_left() -> None:
    model = low_rank_model(7, r=4, r_target=12)
    regress(model, 25)
    t = view(model, "0")
    # 7 usable directions: one event of two pairs, one of the pair that is left
    assert [int(t.events), int(t.cursor), len(t.log)] == [2, 7, 3]
    assert t.RA.shape == (0, 12)


def test_exhaustion_resvd_goes_on_with_the_frozen_part() -> None:
    model = low_rank_model(7, r=4, r_target=12, exhaustion="resvd")
    x = inputs()
    regress(model, 25)
    t = view(model, "0")
    assert int(t.events) == 4
    before = model(x)
    with torch.no_grad():
        t.layer.method.recompose(t, torch.tensor([0, 1]), StepContext(adamw(model), 1, 1))
    torch.testing.assert_close(model(x), before, rtol=1e-5, atol=1e-5)


def test_more_rank_than_directions_is_clamped_with_one_warning() -> None:
    with pytest.warns(UserWarning, match="rank 8 exceeds the 5 useful directions of 0") as caught:
        model = low_rank_model(5, r=8, r_target=12)
    assert len(caught) == 1
    assert view(model, "0").A.shape == (5, 12)
    assert model.peft_config["default"].rank_pattern == {"^0": 5}


def test_a_target_beyond_the_layers_directions_is_clipped_and_said() -> None:
    with pytest.warns(UserWarning, match="r_target=99 exceeds the 12 directions of a 16 x 12 layer"):
        model = adapted("srlora", r_target=99)
    for t in views(model):
        assert t.r + t.RA.shape[0] == min(t.op.shape)


@pytest.mark.parametrize("gamma", [0.25, 0.5, 1.0])
def test_the_export_has_two_ranks_for_each_pair_that_lived(gamma: float) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 80, bias=False)).double()
    model = get_peft_model(net, SRLoraConfig(target_modules=["0"], r=4, r_target=12, gamma=gamma))
    optimizer, x = adamw(model), torch.randn(10, 64, dtype=torch.float64)
    attach(model, optimizer, total_steps=30)
    for _ in range(30):
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    t = view(model, "0")
    recomposed = len(t.log)
    assert recomposed == 8
    down, up = joined_factors(t)
    assert down.shape[0] == 2 * (4 + recomposed)
    delta = t.layer.get_delta_weight("default")
    torch.testing.assert_close(up @ down, delta, rtol=1e-12, atol=1e-12)
    assert torch.linalg.matrix_rank(delta) <= 2 * (4 + recomposed)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 4 * (64 + 80)


# the sheet's task: y = (W + change) x with a change of rank 12 on the directions 4..15 of W, adapters of rank 4
WIDTH, STEPS = 32, 800


def population_loss(cfg: SRLoraConfig | AtlasLoraConfig, seed: int, directions: range) -> float:
    """||W' - W1||_F^2 / 32 after training: the expected squared error of an output for x ~ N(0, I)."""
    generator = torch.Generator().manual_seed(seed)
    w0 = torch.randn(WIDTH, WIDTH, generator=generator) / math.sqrt(WIDTH)
    u, _, vh = torch.linalg.svd(w0)
    w1 = w0 + sum(torch.outer(u[:, i], vh[i]) for i in directions)
    net = nn.Sequential(nn.Linear(WIDTH, WIDTH, bias=False))
    net[0].weight.data.copy_(w0)
    torch.manual_seed(seed)
    model = get_peft_model(net, cfg)
    optimizer = adamw(model, lr=2e-2)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / STEPS)
    attach(model, optimizer, total_steps=STEPS)
    t = view(model, "0")

    def error() -> Tensor:
        return (t.layer.method.delta_weight(t) - (w1 - w0)).square().sum() / WIDTH

    for _ in range(STEPS):
        error().backward()
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
    return float(error())


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("optimizer_reset", ["keep", "zero", "corrected", "mean_v"])
def test_a_change_of_higher_rank_is_learned_where_lora_and_pissa_cannot(optimizer_reset: str, seed: int) -> None:
    shared = {"r": 4, "lora_alpha": 4, "target_modules": ["0"]}
    wide = range(4, 16)
    lora = population_loss(AtlasLoraConfig(**shared), seed, wide)
    assert lora == pytest.approx(8 / WIDTH, abs=2e-3)  # the best rank-4 fit of twelve unit directions
    pissa = population_loss(AtlasLoraConfig(init_weights="pissa", **shared), seed, wide)
    ours = population_loss(SRLoraConfig(r_target=16, optimizer_reset=optimizer_reset, **shared), seed, wide)
    assert ours < 0.05 * min(lora, pissa)


def test_config_errors_name_the_field() -> None:
    cases = {
        "r_target": {"r": 8, "r_target": 4},
        "gamma": {"gamma": 1.5},
        "beta1": {"beta1": 1.0},
        "schedule": {"schedule": "linear"},
        "fresh_length": {"fresh_length": 0.0},
        "optimizer_reset": {"optimizer_reset": "none"},
        "r": {"r": 0},
        "lora_dropout": {"lora_dropout": 1.0},
    }
    for field, options in cases.items():
        with pytest.raises(UserError, match=rf"^SRLoraConfig: {field} must be "):
            SRLoraConfig(**options)
    assert config("srlora", gamma=0).gamma == 0


GRADIENT = {"reservoir": "gradient", "optimizer_reset": "corrected", "fresh_warmup": 3, "select": "oldest"}


@pytest.mark.parametrize(("start", "length"), [(True, 3**-0.5), ("lora", 0.3)])
def test_on_the_gradients_directions_an_event_changes_nothing_and_no_starts_are_kept_needlessly(
    start: Any, length: float
) -> None:
    options = {"init_weights": start, "fresh_length": length, **GRADIENT}
    model, x = adapted("srlora", dtype=torch.float64, **options), inputs(dtype=torch.float64)
    seen = []

    def event(step: int) -> None:
        seen.append(len(view(model).log))

    before = {}
    for t in views(model):
        assert (t.A0 is None) == (start == "lora")
    optimizer = adamw(model)
    attach(model, optimizer, total_steps=20)
    method = view(model).layer.method
    recompose = method.recompose

    def watched(t: Any, slots: Tensor, ctx: StepContext) -> None:
        before[t.layer.path] = model(x).detach()
        recompose(t, slots, ctx)
        torch.testing.assert_close(model(x), before[t.layer.path], rtol=1e-12, atol=1e-12)
        assert torch.equal(t.B[:, slots], torch.zeros_like(t.B[:, slots]))
        rows, others = t.A[slots], t.A[[k for k in range(t.r) if k not in slots.tolist()]]
        torch.testing.assert_close(rows @ rows.T, torch.eye(len(slots), dtype=rows.dtype) * length**2)
        torch.testing.assert_close(
            rows @ others.T, torch.zeros(len(slots), len(others), dtype=rows.dtype), atol=1e-9, rtol=0
        )

    method.recompose = watched
    try:
        train(model, x, steps=20, optimizer=optimizer, each=event)
    finally:
        del method.recompose
    assert seen[-1] == 8
    # one rank of the history a pair where nothing but a product was fused
    assert view(model).HA.shape[0] == (8 if start == "lora" else 12)


def test_the_sketch_finds_the_leading_directions_of_the_gradient() -> None:
    torch.manual_seed(0)
    g, x = torch.randn(400, 30), torch.randn(400, 40)
    strong = torch.linalg.qr(torch.randn(40, 2)).Q.T
    x += 6 * g[:, :2] @ strong  # so that dL/dW = g^T x has two strong right singular directions
    z = torch.zeros(8, 40)
    for part in range(4):
        rows = slice(100 * part, 100 * part + 100)
        accumulate(z, sketch.probe(3, 30, 8, g), g[rows], x[rows])
    kept = torch.randn(3, 40)
    found = sketch.directions(z, 2, kept)
    basis = torch.linalg.qr(kept.T).Q
    vh = torch.linalg.svd(g.T @ (x - x @ basis @ basis.T)).Vh[:2]
    assert torch.linalg.svdvals(found @ vh.T).min() > 0.98
    torch.testing.assert_close(found @ kept.T, torch.zeros(2, 3), atol=1e-5, rtol=0)
    random = sketch.directions(torch.full((8, 40), float("nan")), 2, kept)
    torch.testing.assert_close(random @ random.T, torch.eye(2), atol=1e-5, rtol=1e-5)


def test_only_the_steps_before_an_event_are_looked_into() -> None:
    model = adapted("srlora", init_weights="lora", sketch_steps=2, **GRADIENT)  # events after 4, 8, 12, 16
    t, watched = view(model), []
    optimizer = adamw(model)
    attach(model, optimizer, total_steps=20)

    def look(step: int) -> None:
        watched.append((step + 1, t.probe is not None))

    train(model, inputs(), steps=20, optimizer=optimizer, each=look)
    assert [step for step, on in watched if on] == [3, 4, 7, 8, 11, 12, 15, 16]


@pytest.mark.parametrize("fuse_mode", ["difference", "inplace"])
@pytest.mark.parametrize("kind", ["linear", "conv1d", "conv2d"])
def test_every_kind_of_layer_gathers(kind: str, fuse_mode: str) -> None:
    model = adapted("srlora", kind, init_weights="lora", fuse_mode=fuse_mode, **GRADIENT)
    train(model, inputs(kind), steps=3, total=20)
    assert all(t.sketch.any() for t in views(model))


def test_a_probe_is_drawn_once_an_event_and_read_from_the_host_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two layers of one size share a draw; in the backward passes there is no random number and no number read."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(12, 12), nn.Linear(12, 12))
    model = get_peft_model(net, SRLoraConfig.gradient(target_modules=["0", "1"], r=4, r_target=12, sketch_steps=2))
    optimizer, draws, drawn = adamw(model), [], sketch.probe
    monkeypatch.setattr(sketch, "probe", lambda seed, *rest, **like: draws.append(seed) or drawn(seed, *rest, **like))
    attach(model, optimizer, total_steps=20)
    for _ in range(20):
        loss = model(inputs()).square().mean()
        before = len(draws)
        with monkeypatch.context() as patched:
            patched.setattr(Tensor, "__int__", lambda t: pytest.fail("a tensor is read"))
            patched.setattr(Tensor, "item", lambda t: pytest.fail("a tensor is read"))
            loss.backward()
        assert len(draws) == before
        optimizer.step()
        optimizer.zero_grad()
    assert draws == [0, 7919, 2 * 7919, 3 * 7919]


@pytest.mark.parametrize("options", [{}, {"sketch_steps": 9}], ids=["some steps", "all steps"])
@pytest.mark.parametrize("stop", [2, 3, 4, 15])
def test_a_run_stopped_while_the_sketch_is_gathered_goes_on_bit_for_bit(
    stop: int, options: dict[str, Any], tmp_path: Path
) -> None:
    """Events after 4, 8, 12 and 16 of 20 steps, gathered in the two steps before or all the time."""
    cfg = {"init_weights": "lora", "sketch_steps": 2, **GRADIENT, **options}
    whole = adapted("srlora", **cfg)
    twin = copy.deepcopy(whole)
    train(whole, inputs(), steps=20)
    optimizer = adamw(twin)
    train(twin, inputs(), steps=stop, total=20, optimizer=optimizer)
    twin.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(Toy(), tmp_path, is_trainable=True)
    resumed = adamw(again)
    resumed.load_state_dict(optimizer.state_dict())
    train(again, inputs(), steps=20 - stop, optimizer=resumed)
    for ours, theirs in zip(views(again), views(whole), strict=True):
        for name in (*SRLora.params, *SRLora.buffers):
            if (value := getattr(theirs, name)) is not None:
                assert torch.equal(getattr(ours, name), value), name


def test_minor_directions_are_the_last_of_w_smallest_first() -> None:
    model = adapted("srlora", reservoir="minor", r_target=10, dtype=torch.float64)
    u, s, vh = torch.linalg.svd(view(model).layer.base_matrix(), full_matrices=False)
    t = view(model)
    for k, direction in enumerate(range(11, 5, -1)):
        expected = s[direction] * torch.outer(u[:, direction], vh[direction])
        torch.testing.assert_close(torch.outer(t.RB[:, k], t.RA[k]), expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(t.B @ t.A, u[:, :4] @ torch.diag(s[:4]) @ vh[:4], rtol=1e-9, atol=1e-9)
    train(model, inputs(dtype=torch.float64), steps=20)
    assert int(t.cursor) == 10
    assert t.RA.shape[0] == 0


def test_minor_directions_refuse_what_finds_leading_ones() -> None:
    with pytest.raises(UserError, match=r"svd_method='lowrank' finds leading .* svd_method='auto' or 'full'"):
        config("srlora", reservoir="minor", svd_method="lowrank")
    with pytest.raises(UserError, match=r"exhaustion='resvd' goes on with leading .* exhaustion='stop' or reservoir"):
        config("srlora", reservoir="minor", exhaustion="resvd")


def test_a_further_stage_has_events_of_its_own() -> None:
    model, x = adapted("srlora", init_weights="lora", **GRADIENT), inputs()
    optimizer = adamw(model)
    lifecycle = attach(model, optimizer, total_steps=20)
    train(model, x, steps=20, optimizer=optimizer)
    lifecycle.remove()
    t = view(model)
    first, optimizer = t.log.clone(), adamw(model)
    attach(model, optimizer, total_steps=20, restart=True)
    assert not t.born.any()
    train(model, x, steps=20, optimizer=optimizer)
    second = t.log[len(first) :]
    assert torch.equal(t.log[: len(first)], first)
    assert torch.equal(second[:, 0], first[:, 0])  # the same steps of the new stage
    assert torch.equal(second[:, 3], first[:, 3] + len(first))  # on directions that have new numbers


def test_fresh_pairs_warm_up() -> None:
    factors = SRLora.warmed(torch.tensor([0, 4, 6, 9]), 10, 3)
    assert factors.tolist() == [1.0, 1.0, 1.0, 0.25]
    assert SRLora.warmed(torch.tensor([8, 7]), 10, 3).tolist() == [0.5, 0.75]


def test_presets_are_what_they_say_and_give_way() -> None:
    paper = SRLoraConfig.paper(r=4)
    assert (paper.schedule, paper.reservoir, paper.select, paper.optimizer_reset) == (
        "paper",
        "principal",
        "score",
        "keep",
    )
    ours = SRLoraConfig.gradient(r=4, select="score")
    assert (ours.init_weights, ours.reservoir, ours.select) == ("lora", "gradient", "score")
    row = next(row for row in baselines() if row.slug == "srlora-gradient")
    assert row.options == {**GRADIENT_PRESET, "lora_alpha": 8}
