"""The training loop from the inside: broken off and gone on with, bad batches, full disks, and what the state holds."""

from __future__ import annotations

import csv
import dataclasses
import errno
import os
import re
import shutil
import signal
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks_fit import noise_cases, noise_config, noise_fit, run_noted, weights_of

import medseg
from medseg import fit as module
from medseg.fit import BAD_BATCHES, Fit, what_fits
from medseg.optimise import AVERAGE_POWER
from medseg.progress import silent
from medseg.ranks import Ranks
from medseg.state import STATE, VERSION, read_state, write_state


@pytest.fixture(autouse=True, scope="module")
def threads_as_before() -> Iterator[None]:
    """One thread for what all of these share, and nothing of that left for others."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Sums in the same order on every machine, whatever the test before did, and nothing of determinism left."""
    torch.set_num_threads(1)
    yield
    torch.use_deterministic_algorithms(False)


def _rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "metrics.csv").open(newline="") as file:
        return [{k: v for k, v in row.items() if k != "seconds"} for row in csv.DictReader(file)]


def _before_draw(fit: Fit, number: int, act: Callable[[], Any]) -> None:
    """Do something when the fit asks for its batch `number`, from 0."""
    draw = fit.sampler.draw
    drawn = [0]

    def acting() -> Any:
        if drawn[0] == number:
            act()
        drawn[0] += 1
        return draw()

    fit.sampler.draw = acting  # type: ignore[method-assign]


def _raise(error: BaseException) -> Callable[[], None]:
    def act() -> None:
        raise error

    return act


def _poison(fit: Fit, *numbers: int) -> list[tuple[str, ...]]:
    """NaN into one voxel of these batches, from 0; gives the list that their cases will be in."""
    draw = fit.sampler.draw
    drawn: list[tuple[str, ...]] = []

    def poisoned() -> Any:
        batch = draw()
        if len(drawn) in numbers:
            batch.image[0, 0, 0, 0, 0] = float("nan")
        drawn.append(batch.cases)
        return batch

    fit.sampler.draw = poisoned  # type: ignore[method-assign]
    return drawn


# ---- broken off and gone on with


@pytest.mark.parametrize("batches", [3, 4])
def test_a_fit_that_is_broken_off_anywhere_goes_on_bit_for_bit(tmp_path: Path, batches: int) -> None:
    config = noise_config(train={"save_every_s": 1e-9})
    whole = run_noted(noise_fit(tmp_path / "whole", config))
    fit = noise_fit(tmp_path / "parts", config)
    # in the middle of an epoch, and at its end
    _before_draw(fit, batches, _raise(SystemExit()))
    with pytest.raises(SystemExit):
        fit.run(silent)
    rest = run_noted(noise_fit(tmp_path / "parts", config, resume=True))
    assert rest.losses == whole.losses[batches:]
    assert rest.weights == whole.weights
    assert rest.dice == whole.dice
    assert _rows(tmp_path / "parts") == _rows(tmp_path / "whole")


def test_steps_after_the_last_state_are_done_again(tmp_path: Path) -> None:
    whole = run_noted(noise_fit(tmp_path / "whole", noise_config()))
    fit = noise_fit(tmp_path / "parts", noise_config())
    _before_draw(fit, 3, fit.save)
    # two rows are written then, the second of them after the state
    _before_draw(fit, 5, _raise(SystemExit()))
    with pytest.raises(SystemExit):
        fit.run(silent)
    assert len(_rows(tmp_path / "parts")) == 2
    rest = run_noted(noise_fit(tmp_path / "parts", noise_config(), resume=True))
    assert rest.losses == whole.losses[3:]
    assert rest.weights == whole.weights
    assert _rows(tmp_path / "parts") == _rows(tmp_path / "whole")


@pytest.mark.parametrize(("number", "error"), [(signal.SIGTERM, medseg.Preempted), (signal.SIGINT, KeyboardInterrupt)])
def test_a_signal_saves_the_state_and_ends(tmp_path: Path, number: int, error: type[BaseException]) -> None:
    whole = run_noted(noise_fit(tmp_path / "whole", noise_config()))
    fit = noise_fit(tmp_path / "parts", noise_config())
    _before_draw(fit, 2, lambda: os.kill(os.getpid(), number))
    with pytest.raises(error) as caught:
        fit.run(silent)
    assert type(caught.value) is error
    rest = run_noted(noise_fit(tmp_path / "parts", noise_config(), resume=True))
    # the step in which it came was finished
    assert rest.losses == whole.losses[3:]
    assert rest.weights == whole.weights


def test_a_second_signal_while_the_state_is_written_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(folder: Path, state: Any) -> None:
        asked = state["course"]["step"] == 3
        if asked:
            os.kill(os.getpid(), signal.SIGTERM)
        write_state(folder, state)
        if asked:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(module, "write_state", interrupted)
    fit = noise_fit(tmp_path, noise_config())
    _before_draw(fit, 2, lambda: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(medseg.Preempted):
        fit.run(silent)
    assert read_state(tmp_path)["course"]["step"] == 3
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []


def test_a_signal_while_the_last_state_is_written_ends_the_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(folder: Path, state: Any) -> None:
        write_state(folder, state)
        if state["course"]["step"] == 6:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(module, "write_state", interrupted)
    with pytest.raises(medseg.Preempted):
        noise_fit(tmp_path, noise_config()).run(silent)
    assert read_state(tmp_path)["course"]["step"] == 6


def test_a_signal_ends_a_validation_which_is_then_done_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = run_noted(noise_fit(tmp_path / "whole", noise_config()))
    fit = noise_fit(tmp_path / "parts", noise_config())
    dice = module.quick_dice

    def told(config: Any, network: Any, cases: Any, *more: Any, **tick: Any) -> dict[str, float]:
        os.kill(os.getpid(), signal.SIGTERM)
        return dice(config, network, cases, *more, **tick)

    monkeypatch.setattr(module, "quick_dice", told)
    with pytest.raises(medseg.Preempted):
        fit.run(silent)
    monkeypatch.undo()
    assert _rows(tmp_path / "parts") == []
    rest = run_noted(noise_fit(tmp_path / "parts", noise_config(), resume=True))
    assert rest.weights == whole.weights
    assert _rows(tmp_path / "parts") == _rows(tmp_path / "whole")


def test_a_signal_within_a_large_case_is_heard_after_the_window(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shares: list[float] = []
    dice = module.quick_dice

    def told(*given: Any, tick: Callable[[float], None]) -> dict[str, float]:
        def heard(share: float) -> None:
            shares.append(share)
            os.kill(os.getpid(), signal.SIGTERM)
            tick(share)

        return dice(*given, tick=heard)

    monkeypatch.setattr(module, "quick_dice", told)
    with pytest.raises(medseg.Preempted):
        noise_fit(tmp_path, noise_config(windows={"patch_size": [8, 8, 8]})).run(silent)
    assert len(shares) == 1
    assert shares[0] < 1
    assert read_state(tmp_path)["course"]["validated_at"] == -1


def test_a_signal_that_is_ignored_stays_ignored(tmp_path: Path) -> None:
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        fit = noise_fit(tmp_path, noise_config())
        _before_draw(fit, 2, lambda: os.kill(os.getpid(), signal.SIGTERM))
        fit.run(silent)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert fit.course.step == 6


def test_two_fits_with_one_seed_are_one_and_another_seed_is_another(tmp_path: Path) -> None:
    one, two, other = (
        run_noted(noise_fit(tmp_path / str(n), noise_config(train={"seed": seed}))) for n, seed in enumerate((3, 3, 4))
    )
    assert one == two
    assert other.losses != one.losses


def test_settings_of_the_optimiser_are_those_asked_for_last(state: Path) -> None:
    fit = noise_fit(state.parent, noise_config(train={"weight_decay": 0.5, "epochs": 4}), resume=True)
    assert {group["weight_decay"] for group in fit.optimizer.param_groups} == {0.5}


def test_what_is_learnt_otherwise_from_now_on_is_told(state: Path, caplog: pytest.LogCaptureFixture) -> None:
    longer = {"epochs": 4, "weight_decay": 0.5, "save_every_s": 7.0}
    before = noise_config()
    noise_fit(state.parent, noise_config(train=longer, augment={"p_noise": 0.25}), resume=True)
    assert caplog.messages == [
        f"{state}: from here on with augment.p_noise 0.25 (was {before.augment.p_noise}), "
        f"train.weight_decay 0.5 (was {before.train.weight_decay}), as its weights have not been learnt so far"
    ]


def test_a_longer_end_and_the_state_of_an_earlier_medseg_need_no_word(
    state: Path, caplog: pytest.LogCaptureFixture
) -> None:
    noise_fit(state.parent, noise_config(train={"epochs": 9}), resume=True)
    content = read_state(state.parent)
    assert content["settings"].pop("train.weight_decay") == noise_config().train.weight_decay
    write_state(state.parent, content)
    noise_fit(state.parent, noise_config(train={"weight_decay": 0.5}), resume=True)
    assert content.pop("settings")["train.epochs"] == 3
    write_state(state.parent, content)
    noise_fit(state.parent, noise_config(train={"learning_rate": 0.5}), resume=True)
    assert caplog.messages == []


# ---- a state that cannot be believed


def test_an_end_that_lies_behind_is_refused(state: Path) -> None:
    told = (
        f"{state}: has learnt 6 steps, more than the 2 epochs of 2 steps that are asked for; expected --epochs 3, which"
    )
    assert told in _refusal(state.parent, noise_config(train={"epochs": 2}))
    content = read_state(state.parent)
    content["course"]["elapsed"] = 61.2
    write_state(state.parent, content)
    told = (
        f"{state}: has learnt for 61 s, more than the --time-budget 60s that are asked for; expected --time-budget 62s"
    )
    assert told in _refusal(state.parent, noise_config(train={"epochs": None, "time_budget_s": 60}))
    fit = noise_fit(state.parent, noise_config(train={"epochs": None, "time_budget_s": 62}), resume=True)
    assert fit.course.step == 6


def test_other_settings_after_the_end_are_refused(state: Path) -> None:
    told = (
        "6 steps and is at its end, so that nothing would be learnt with loss.smooth 0.5 (was 1e-05); leave that as it"
    )
    assert told in _refusal(state.parent, noise_config(loss={"smooth": 0.5}))


def test_a_time_budget_that_was_kept_a_little_late_is_its_own_end(tmp_path: Path) -> None:
    config = noise_config(train={"epochs": None, "time_budget_s": 60})
    fit = noise_fit(tmp_path, config)
    fit.course.elapsed = 60.4
    fit.save()
    assert noise_fit(tmp_path, config, resume=True).progress == 1


def test_another_seed_is_refused(state: Path) -> None:
    assert "was begun with seed 0, found train.seed 1" in _refusal(state.parent, noise_config(train={"seed": 1}))


def _refusal(folder: Path, config: medseg.Config | None = None) -> str:
    with pytest.raises(medseg.ConfigError) as caught:
        noise_fit(folder, config or noise_config(), resume=True)
    return str(caught.value)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a fit that was run to its end. Shared: read only."""
    folder = tmp_path_factory.mktemp("finished")
    noise_fit(folder, noise_config()).run(silent)
    return folder


@pytest.fixture
def state(finished: Path, tmp_path: Path) -> Path:
    """Its file, to be changed, in `tmp_path`."""
    return Path(shutil.copy(finished / STATE, tmp_path / STATE))


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.99])
def test_half_a_state_is_refused(state: Path, share: float) -> None:
    content = state.read_bytes()
    state.write_bytes(content[: int(share * len(content))])
    assert f"{state}: cannot be resumed, because it is damaged" in _refusal(state.parent)


def test_a_state_with_one_wrong_bit_is_refused(state: Path) -> None:
    content = bytearray(state.read_bytes())
    content[len(content) // 2] ^= 1
    state.write_bytes(bytes(content))
    assert f"{state}: cannot be resumed, because it is damaged" in _refusal(state.parent)


@pytest.mark.parametrize("deterministic", [True, False])
@pytest.mark.parametrize(
    ("what", "was", "now", "way"),
    [("precision", "32", "bf16", "--precision 32"), ("threads", "1", "2", "OMP_NUM_THREADS=1 in the environment")],
)
def test_a_fit_goes_on_in_another_arithmetic_with_a_word_or_not_at_all(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, what: str, was: str, now: str, way: str, deterministic: bool
) -> None:
    settings = {"deterministic": deterministic}
    noise_fit(tmp_path, noise_config(train=settings)).save()
    if what == "threads":
        torch.set_num_threads(2)
    else:
        settings |= {"precision": now}
    told = f"{tmp_path / STATE}: was computed with {what} {was}, found {now} here; "
    if deterministic:
        refused = f"{re.escape(told)}expected the same, .*: resume with {way}, or .* --set train.deterministic=false"
        with pytest.raises(medseg.ConfigError, match=refused):
            noise_fit(tmp_path, noise_config(train=settings), resume=True)
        return
    noise_fit(tmp_path, noise_config(train=settings), resume=True)
    assert (f"{told}{way} keeps it" in caplog.text) is (what == "precision")


def test_a_state_of_earlier_that_does_not_say_how_it_was_computed_is_gone_on_with(tmp_path: Path) -> None:
    noise_fit(tmp_path, noise_config()).save()
    state = read_state(tmp_path)
    assert state.pop("arithmetic") == {"precision": "32", "threads": 1}
    write_state(tmp_path, state)
    fit = noise_fit(tmp_path, noise_config(), resume=True)
    fit.run(silent)
    assert fit.course.step == 6


def test_a_state_that_another_machine_has_is_not_called_damaged(tmp_path: Path) -> None:
    with pytest.raises(medseg.ConfigError, match=r"no such file for this process.* a disk that all processes share"):
        noise_fit(tmp_path, noise_config(), resume=True)


@pytest.mark.parametrize("version", [None, VERSION + 1])
def test_a_state_of_another_version_is_refused(state: Path, version: int | None) -> None:
    content = torch.load(state, weights_only=True)
    torch.save({k: v for k, v in content.items() if k != "version"} | ({"version": version} if version else {}), state)
    assert f"of version {version or 1}, expected {VERSION}; go on with the medseg that wrote it" in _refusal(
        state.parent
    )


def test_a_state_of_other_files_under_the_same_names_is_refused(state: Path) -> None:
    ranks = Ranks(torch.device("cpu"))
    write_state(state.parent, read_state(state.parent) | {"learnt": "0a0a" * 16})
    with pytest.raises(medseg.ConfigError, match=r"was trained on other files under the same names \(SHA-256 0a0a"):
        Fit(noise_config(), noise_cases(5), noise_cases(1), state.parent, ranks, learnt="bb" * 32, resume=True)


# ---- bad batches


def test_a_batch_with_nan_is_skipped_and_its_cases_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    fit = noise_fit(tmp_path, noise_config())
    drawn = _poison(fit, 3)
    outcome = run_noted(fit)
    assert len(drawn) == 7
    assert (fit.course.step, fit.record()["steps"], fit.record()["skipped_batches"]) == (6, 6, 1)
    assert f"the loss is nan at step 3; this batch of {', '.join(drawn[3])} is skipped" in caplog.text
    # the averages of the batch normalisation as well
    assert torch.isfinite(torch.tensor(outcome.weights)).all()


def test_what_a_bad_batch_leaves_behind_is_nothing(tmp_path: Path) -> None:
    fit = noise_fit(tmp_path, noise_config())
    _poison(fit, 0)
    before = weights_of(fit.network.module)
    fit._learn()
    assert (fit.course.skipped, fit.course.losses) == (1, [])
    assert weights_of(fit.network.module) == before


def test_a_batch_that_does_not_fit_leaves_behind_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def short(*_: Any, **__: Any) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    fit = noise_fit(tmp_path, noise_config())
    before = weights_of(fit.network.module)
    # the network has seen the batch by then, and looks for a smaller one
    monkeypatch.setattr(module, "loss_of", short)
    with pytest.raises(medseg.TrainingError, match="out of memory"):
        fit._learn()
    assert weights_of(noise_fit(tmp_path, noise_config(), resume=True).network.module) == before


@pytest.mark.parametrize(
    ("patch", "smaller"),
    [((40, 56, 40), (24, 40, 24)), ((8, 64, 64), (8, 48, 48)), ((10, 20, 17), (10, 16, 16)), ((16, 8, 16), None)],
)
def test_a_patch_that_does_not_fit_gets_smaller_on_its_long_axes(
    patch: tuple[int, ...], smaller: tuple[int, ...] | None
) -> None:
    config = noise_config(train={"batch_size": 1}, windows={"patch_size": patch})
    found = what_fits(config, lambda batch, fitting: None)
    assert found == (None if smaller is None else (1, smaller))


def test_held_back_cases_that_cannot_be_judged_end_no_fit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: Any, **__: Any) -> dict[str, float]:
        raise medseg.DataError("case0: the network gave scores that are no numbers")

    fit = noise_fit(tmp_path, noise_config())
    monkeypatch.setattr(module, "quick_dice", refuse)
    fit.run(silent)
    assert fit.course.step == 6
    assert "held-back cases are not judged at step 6: case0: the network gave scores that are no numbers" in caplog.text


def test_a_long_look_at_held_back_cases_begins_with_a_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fit = noise_fit(tmp_path, noise_config(train={"save_every_s": 3600.0}))
    looks: list[int] = []

    def killed(*_: Any, **__: Any) -> dict[str, float]:
        looks.append(fit.course.step)
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "quick_dice", killed)
    with pytest.raises(KeyboardInterrupt):
        fit.run(silent)
    assert noise_fit(tmp_path, noise_config(), resume=True).course.step == looks[0] > 0


def test_bad_batches_in_a_row_end_the_fit_and_leave_a_state(tmp_path: Path) -> None:
    config = noise_config()
    fit = noise_fit(tmp_path, config)
    drawn = _poison(fit, *range(3, 3 + BAD_BATCHES))
    with pytest.raises(medseg.TrainingError, match="the loss is nan at step 3 and in the 2 batches before") as caught:
        fit.run(silent)
    assert f"held {', '.join(drawn[-1])}: look at these cases with `medseg check`" in str(caught.value)
    rest = noise_fit(tmp_path, config, resume=True)
    assert rest.course.step == 3
    assert torch.isfinite(torch.tensor(run_noted(rest).weights)).all()


def test_a_gradient_that_is_nan_is_no_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # √(0·x): 0 with the gradient 0/0
    monkeypatch.setattr(module, "loss_of", lambda _c, _d, logits, _l, **_: (0 * logits).sum().sqrt())
    fit = noise_fit(tmp_path, noise_config())
    with pytest.raises(medseg.TrainingError, match="the gradient is not finite at step 0"):
        fit.run(silent)
    assert fit.course.skipped == BAD_BATCHES


# ---- disks and memory that are full


def test_a_full_disk_ends_the_fit_and_keeps_the_state_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = run_noted(noise_fit(tmp_path / "whole", noise_config()))
    fit = noise_fit(tmp_path / "parts", noise_config())
    _before_draw(fit, 3, fit.save)

    def fill() -> None:
        def full(path: Path, *_: Any) -> int:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr(Path, "write_bytes", full)

    _before_draw(fit, 4, fill)
    with pytest.raises(medseg.TrainingError, match="then go on with --resume") as caught:
        fit.run(silent)
    assert f"{tmp_path / 'parts'}: cannot write last.pt (No space left on device)" in str(caught.value)
    monkeypatch.undo()
    assert [p.name for p in (tmp_path / "parts").iterdir() if p.name.startswith(".")] == []
    rest = run_noted(noise_fit(tmp_path / "parts", noise_config(), resume=True))
    assert rest.weights == whole.weights


@pytest.mark.parametrize("file", ["metrics.csv", "events"])
def test_a_disk_that_is_full_when_the_fit_goes_on_is_no_wrong_usage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str
) -> None:
    config = noise_config()
    fit = noise_fit(tmp_path, config)
    _before_draw(fit, 3, _raise(KeyboardInterrupt()))
    _before_draw(fit, 3, fit.save)
    with pytest.raises(KeyboardInterrupt):
        fit.run(silent)

    def full(*_: Any, **__: Any) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    if file == "events":
        monkeypatch.setattr("medseg.journal.EventsWriter", full)
    else:
        monkeypatch.setattr(Path, "write_text", full)
    told = r"no row can be written \(.*No space left on device.*then go on with --resume"
    with pytest.raises(medseg.TrainingError, match=told):
        noise_fit(tmp_path, config, resume=True).run(silent)
    monkeypatch.undo()
    rest = noise_fit(tmp_path, config, resume=True)
    rest.run(silent)
    assert [row["step"] for row in _rows(tmp_path)] == ["2", "4", "6"]


@pytest.fixture
def away(monkeypatch: pytest.MonkeyPatch) -> Callable[[Fit, Collection[int]], None]:
    """Takes the disk away from a fit at some steps: for its state, its rows and its events."""

    def make(fit: Fit, steps: Collection[int]) -> None:
        write, open_ = Path.write_bytes, Path.open

        def check() -> None:
            if fit.course.step in steps:
                raise OSError(errno.ESTALE, "Stale file handle")

        def write_bytes(path: Path, *given: Any) -> int:
            check()
            return write(path, *given)

        def opened(path: Path, mode: str = "r", **more: Any) -> Any:
            if "a" in mode:
                check()
            return open_(path, mode, **more)

        monkeypatch.setattr(Path, "write_bytes", write_bytes)
        monkeypatch.setattr(Path, "open", opened)

    return make


def test_a_disk_that_is_away_for_a_moment_ends_no_fit(
    tmp_path: Path, away: Callable[[Fit, Collection[int]], None], caplog: pytest.LogCaptureFixture
) -> None:
    fit = noise_fit(tmp_path, noise_config(train={"save_every_s": 1e-9}))
    away(fit, (2, 3))
    run_noted(fit)
    assert "cannot write last.pt (Stale file handle)" in caplog.text
    assert "metrics.csv: cannot be written (Stale file handle); tried again with the next row" in caplog.text
    rows = (tmp_path / "metrics.csv").read_text().splitlines()[1:]
    assert [row.split(",")[1] for row in rows] == ["2", "4", "6"]
    assert noise_fit(tmp_path, noise_config(), resume=True).course.step == 6


def test_a_disk_is_away_from_the_first_state_that_it_did_not_take(
    tmp_path: Path, away: Callable[[Fit, Collection[int]], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    fit = noise_fit(tmp_path, noise_config(train={"save_every_s": 1e-9}))
    # each state is a long while after the one before
    monkeypatch.setattr(module.time, "monotonic", lambda: 2 * module.AWAY_S * fit.course.step)
    away(fit, (2,))
    run_noted(fit)
    assert fit.course.step == 6


def test_a_disk_that_stays_away_ends_the_fit(
    tmp_path: Path, away: Callable[[Fit, Collection[int]], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "AWAY_S", -1.0)
    fit = noise_fit(tmp_path, noise_config(train={"save_every_s": 1e-9}))
    away(fit, range(2, 7))
    with pytest.raises(medseg.TrainingError, match=r"cannot write last\.pt \(Stale file handle\)"):
        fit.run(silent)
    assert fit.course.step == 2


def test_memory_that_runs_out_leaves_a_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fit = noise_fit(tmp_path, noise_config())
    loss = module.loss_of

    def short(*arguments: Any, **more: Any) -> torch.Tensor:
        if fit.course.step == 3:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return loss(*arguments, **more)

    monkeypatch.setattr(module, "loss_of", short)
    advice = r"train.batch_size=1 fits: go on with --resume --set train.batch_size=1"
    with pytest.raises(medseg.TrainingError, match=rf"out of memory on cpu.* at step 3, with .*: {advice}"):
        fit.run(silent)
    monkeypatch.undo()
    smaller = noise_config(train={"batch_size": 1})
    rest = noise_fit(tmp_path, smaller, resume=True)
    assert rest.course.step == 3
    rest.run(silent)
    assert rest.course.step == 6


@pytest.mark.parametrize("where", ["the draw", "validation"])
def test_memory_that_runs_out_beside_the_steps_leaves_a_state(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    fit = noise_fit(tmp_path, noise_config())
    full = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
    if where == "the draw":
        _before_draw(fit, 2, _raise(full))
    else:
        monkeypatch.setattr(module, "quick_dice", lambda *_, **__: _raise(full)())
    with pytest.raises(medseg.TrainingError, match=r"out of memory on .* at step 2, .* the state is saved: .*--resume"):
        fit.run(silent)
    monkeypatch.undo()
    rest = noise_fit(tmp_path, noise_config(), resume=True)
    assert rest.course.step == 2
    rest.run(silent)
    assert rest.course.step == 6


# ---- what the weights are


def test_the_weights_are_the_average_of_those_of_all_steps_the_later_the_heavier(tmp_path: Path) -> None:
    fit = noise_fit(tmp_path, noise_config())
    seen = []
    step = fit._try_step

    def noted(*arguments: Any) -> float | None:
        value = step(*arguments)
        seen.append({k: v.double().clone() for k, v in fit.network.module.named_parameters()})
        return value

    fit._try_step = noted  # type: ignore[method-assign]
    network = fit.run(silent)
    assert len(seen) == 6
    # the average of t steps is moved by 1 − (1 − 1/t)^(γ+1) towards step t
    shares = [1.0]
    for t in range(2, 7):
        new = 1 - (1 - 1 / t) ** (AVERAGE_POWER + 1)
        shares = [s * (1 - new) for s in shares] + [new]
    assert shares == sorted(shares)
    for name, found in network.named_parameters():
        wanted = sum(share * weights[name] for share, weights in zip(shares, seen))
        assert torch.allclose(found.double(), wanted, atol=1e-6)
    batches = {int(v) for k, v in network.state_dict().items() if k.endswith("num_batches_tracked")}
    assert batches == {6}


def test_looks_at_held_back_cases_choose_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = run_noted(noise_fit(tmp_path / "whole", noise_config()))
    dice = iter([0.9, 0.2, 0.1])
    monkeypatch.setattr(module, "quick_dice", lambda *_, **__: {"label_1": next(dice)})
    other = run_noted(noise_fit(tmp_path / "other", noise_config()))
    assert other.weights == whole.weights
    assert other.dice == 0.1


def test_there_are_a_few_looks_however_many_the_epochs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "quick_dice", lambda *_, **__: {"label_1": 0.5})
    noise_fit(tmp_path, noise_config(train={"epochs": 20, "steps_per_epoch": 1})).run(silent)
    looked = [int(row["step"]) for row in _rows(tmp_path) if row["dice"]]
    assert looked == [3, 5, 8, 10, 13, 15, 18, 20]


@pytest.fixture
def clocked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[float], tuple[Fit, Callable[[float], Any]]]:
    """A fit of 1,200 s, of which looks may take 60, whose held-back case takes some seconds in four windows."""

    def made(seconds: float) -> tuple[Fit, Callable[[float], Any]]:
        now = [0.0]

        def look(config: Any, network: Any, cases: Any, *_: Any, tick: Callable[[float], None]) -> dict[str, float]:
            for _ in cases:
                for window in range(1, 5):
                    now[0] += seconds / 4
                    tick(window / 4)
            return {"label_1": 0.5}

        def validate_at(elapsed: float) -> Any:
            fit.course.elapsed, fit.course.step = elapsed, int(elapsed)
            return fit._validate_if_time(lambda: 0)

        monkeypatch.setattr(module, "quick_dice", look)
        monkeypatch.setattr(module.time, "perf_counter", lambda: now[0])
        settings = {"epochs": None, "time_budget_s": 1200.0, "deterministic": False}
        fit = noise_fit(tmp_path / f"{seconds:g}", noise_config(train=settings))
        return fit, validate_at

    return made


def test_looks_at_a_case_that_takes_too_long_keep_to_their_share(clocked: Any) -> None:
    fit, validate_at = clocked(200.0)
    fit.course.dice = 0.4
    spent = 0.0
    for elapsed in range(40, 1201, 20):
        assert validate_at(float(elapsed)) == {}
        # what is broken off ends with the window, here 50 s long, in which its time is over
        assert fit.course.validating <= 0.05 * elapsed + 50
        spent = max(spent, fit.course.validating)
    assert spent <= 60 + 50
    assert validate_at(1201.0) == {}
    assert fit.course.validated_at == 1201
    # a Dice of weights that are no more is not told of those that are kept
    assert fit.record()["dice_while_training"] is None


def test_a_look_waits_until_its_share_of_what_has_passed_is_enough(clocked: Any) -> None:
    fit, validate_at = clocked(10.0)
    # 2 s are there: it is broken off after the first window
    assert validate_at(40.0) == {}
    assert fit.course.validating == pytest.approx(2.5)
    # twice the time of that, beside what has been spent: a twentieth of 129 s is 6.45 s
    assert validate_at(129.0) == {}
    assert fit.course.validating == pytest.approx(2.5)
    assert validate_at(131.0) == {}
    assert fit.course.validating == pytest.approx(7.5)
    # whatever time there is may be used, and is
    assert validate_at(600.0) == {"label_1": 0.5}
    assert fit.course.validating == pytest.approx(17.5)
    assert validate_at(549.0) == {}
    assert validate_at(551.0) == {"label_1": 0.5}
    # the last look says how the weights that are kept do
    fit.course.validating = 60.0
    assert validate_at(1201.0) == {}
    fit.course.validating = 52.0
    assert validate_at(1201.0) == {"label_1": 0.5}
    assert fit.course.validating == pytest.approx(62.0)


def test_what_a_look_takes_is_learnt_anew_on_another_machine(tmp_path: Path) -> None:
    fit = noise_fit(tmp_path, noise_config())
    fit.course = dataclasses.replace(fit.course, look_s=1000.0, watched=1)
    fit.save()
    again = noise_fit(tmp_path, noise_config(), resume=True)
    assert (again.course.look_s, again.course.watched) == (0.0, None)


def test_a_look_that_fails_writes_no_state_each_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: Any, **__: Any) -> dict[str, float]:
        raise medseg.DataError("case0: the network gave scores that are no numbers")

    settings = {"epochs": None, "time_budget_s": 1200.0, "deterministic": False}
    fit = noise_fit(tmp_path, noise_config(train=settings))
    states: list[int] = []
    monkeypatch.setattr(fit, "_save_on_the_way", lambda: states.append(fit.course.step))
    monkeypatch.setattr(module, "quick_dice", refuse)
    fit.course.dice = 0.5
    for step in (10, 20, 30):
        fit.course.elapsed, fit.course.step = 10.0 * step, step
        assert fit._validate_if_time(lambda: 0) == {}
    # that of earlier weights would be told as of the last ones
    assert fit.course.dice is None
    assert caplog.text.count("held-back cases are not judged") == 3
    assert states == [10]


def test_a_label_that_no_held_back_case_has_is_not_scored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "quick_dice", lambda *_, **__: {})
    fit = noise_fit(tmp_path, noise_config())
    fit.run(silent)
    assert fit.course.dice is None
    assert fit.record()["dice_while_training"] is None


# ---- the time that steps wait


def test_waiting_for_data_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fit = noise_fit(tmp_path, noise_config())
    fit.course = dataclasses.replace(fit.course, elapsed=12.0, validating=2.0, waiting=2.5)
    assert fit.record()["waiting_share"] == 0.25


def test_waiting_for_data_is_measured_around_the_draw(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [100.0]
    fit = noise_fit(tmp_path, noise_config())
    draw = fit.sampler.draw

    def slow() -> Any:
        clock[0] += 3.0
        return draw()

    fit.sampler.draw = slow  # type: ignore[method-assign]
    monkeypatch.setattr(module.time, "perf_counter", lambda: clock[0])
    fit.run(silent)
    # six batches, and nothing else takes time on this clock
    assert (fit.course.waiting, fit.waiting_share) == (18.0, 1.0)
