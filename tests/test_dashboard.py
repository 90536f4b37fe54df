"""The dashboard: Stop leaves a checkpoint from which the run goes on as if nothing had happened."""

import asyncio

import pytest
import torch
from smoke_lab import beside, smoke_lab

from usjepa_nb import pretrain
from usjepa_nb.widgets import dashboard


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return smoke_lab(tmp_path_factory)


@pytest.fixture
def lab(base, tmp_path, monkeypatch):
    monkeypatch.delenv("USJEPA_EXERCISE", raising=False)
    return beside(base, tmp_path)


def stop_at(board, step, monkeypatch):
    """Press Stop while the picture of `step` is drawn, as another thread would."""
    draw = board._draw

    def drawing(left):
        draw(left)
        if len(board.run.history) == step:
            board.button.click()

    monkeypatch.setattr(board, "_draw", drawing)


def weights(run):
    return run.objective.state_dict()


def test_stop_leaves_a_checkpoint_and_asking_again_gives_the_same_run(base, lab, tmp_path_factory, monkeypatch):
    board = dashboard.Dashboard(lab, "vjepa_ll", lam=0.25, every=1)
    stop_at(board, 2, monkeypatch)
    assert asyncio.run(board.train()) is False
    checkpoint = lab.folder(board.spec) / "checkpoint.pt"
    assert pretrain.steps_done(checkpoint) == 2 and not board.finished
    assert not lab.trained("vjepa_ll", 0.25)
    assert "stopped at step 2 of 6" in board.status.value and board.button.disabled
    resumed = lab.encoder("vjepa_ll", 0.25)  # the lock is free
    never = beside(base, tmp_path_factory.mktemp("never")).encoder("vjepa_ll", 0.25)
    assert resumed.history.step.tolist() == [1, 2, 3, 4, 5, 6]
    for name, value in weights(resumed).items():
        assert torch.equal(value, weights(never)[name]), name


def test_the_whole_run_is_drawn(lab):
    board = dashboard.Dashboard(lab, "vjepa_ll", lam=0.25, every=2)
    assert asyncio.run(board.train()) is True and board.finished
    history = board.run.history
    drawn = {trace.name: trace for trace in board.figure.data}
    assert drawn.keys() == {"loss", "jepa", "zero", "ll", "grad_norm", "lr", "std", "rank", "position_share"}
    assert drawn["ll"].y.tolist() == history.ll.tolist() and drawn["ll"].x.tolist() == [1, 2, 3, 4, 5, 6]
    assert drawn["rank"].x.tolist() == [2, 4, 6]
    styles = [(t.line.color, t.line.dash) for t in board.figure.data[:4]]
    assert len({dash for _, dash in styles}) == 4
    assert board.progress.value == 6 and "complete" in board.status.value and board.button.disabled


def test_a_finished_run_is_drawn_at_once_and_a_method_without_training_has_no_curves(lab):
    lab.encoder("videomae")
    board = dashboard.Dashboard(lab, "videomae")
    assert asyncio.run(board.train()) is True
    assert "jepa" not in {trace.name for trace in board.figure.data} and len(board.figure.data[0].x) == 6
    nothing = dashboard.Dashboard(lab, "random")
    assert asyncio.run(nothing.train()) is True and nothing.figure is None


def test_an_interrupt_says_what_is_on_disk_and_goes_on_to_the_caller(lab, monkeypatch):
    board = dashboard.Dashboard(lab, "vjepa", every=1)

    def interrupt(left):
        if len(board.run.history) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(board, "_draw", interrupt)
    with pytest.raises(KeyboardInterrupt):
        asyncio.run(board.train())
    assert "step 3 of 6 is on disk" in board.status.value and board.button.disabled
    assert len(lab.encoder("vjepa").history) == 6


def test_pictures_start_where_an_earlier_session_ended(lab, monkeypatch):
    first = dashboard.Dashboard(lab, "vjepa", every=1)
    stop_at(first, 4, monkeypatch)
    asyncio.run(first.train())
    seen = []
    second = dashboard.Dashboard(lab, "vjepa", every=1)
    monkeypatch.setattr(second, "_draw", lambda left: seen.append((len(second.run.history), left)))
    asyncio.run(second.train())
    assert [step for step, _ in seen] == [4, 5, 6, 6]
    assert seen[0][1] != seen[0][1] and seen[-1][1] == 0


def test_the_event_loop_gets_a_turn_at_every_checkpoint(lab):
    """What delivers a click while the cell runs: whatever waits in the loop is handled before the next steps."""
    board = dashboard.Dashboard(lab, "vjepa", every=1)

    async def learner():
        while board.run is None or len(board.run.history) < 2:
            await asyncio.sleep(0)
        board.button.click()

    async def both():
        pressing = asyncio.create_task(learner())
        complete = await board.train()
        await pressing
        return complete

    assert asyncio.run(both()) is False
    assert pretrain.steps_done(lab.folder(board.spec) / "checkpoint.pt") == 2


def test_seconds_left_by_hand():
    assert dashboard.seconds_left(10.0, 30.0, 40, 50, 100) == 100  # 10 steps in 20 s, 50 to go
    left = dashboard.seconds_left(10.0, 30.0, 40, 40, 100)
    assert left != left


def test_exercise_presses_stop_once_and_finishes(lab, monkeypatch):
    monkeypatch.setenv("USJEPA_EXERCISE", "1")
    ends = []
    train = dashboard.Dashboard.train

    async def noted(self):
        ends.append(await train(self))

    monkeypatch.setattr(dashboard.Dashboard, "train", noted)
    board = asyncio.run(dashboard.watch(lab, "vjepa", every=1))
    assert ends == [False, True] and board.finished
