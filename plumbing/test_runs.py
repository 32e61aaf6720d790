"""Runs of training that are stopped, resumed or go wrong.

No signal, crash, full disk or bad step costs more than the steps since the last checkpoint, or changes a bit.
"""
import errno
import math
import os
import signal

import pytest
import torch

import data
import train
from model import DCSSDAE
from plumbing import checkpoint as checkpoint_module
from test_all import (
    DISTILL,
    SMALL,
    aside,
    command,
    folder_of,
    latest,
    lines_of,
    run,
    same_weights,
    sentence,
    slow,
    step_lines,
)

KILLED = (0, 1, -signal.SIGKILL)  # exit codes of processes of which one is killed


def log_of(folder):
    """A run's log without what a clock or the memory measures."""
    lines = []
    for line in lines_of(folder / "log.jsonl"):
        line = {k: v for k, v in line.items() if k not in ("images_per_s", "peak_mib")}
        if "eval" in line:
            line["eval"] = [{k: v for k, v in row.items() if k != "ms"} for row in line["eval"]]
        lines.append(line)
    return lines


@slow
@pytest.mark.parametrize("world,workers,module", [(2, 2, "train"), (1, 0, "distill")])
def test_a_stopped_run_ends_as_if_it_had_not_been(tmp_path, world, workers, module, smallest):
    """One command again and again: killed before the first checkpoint and after one, then a polite signal to one rank
    and its data loader: weights, average, optimisers and log are bit-identical in the end."""
    flags, steps = [*SMALL, "--w_gan", 0.1, "--gan_start", 2], 6
    if module == "distill":
        teacher = DCSSDAE("dc_f8c4", "XS", "fm", 0.0625, depth=1, notes={"size": 16, "w_lpips": 0})
        teacher.save(tmp_path / "t.safetensors")
        flags = [*DISTILL, "--ckpt", tmp_path / "t.safetensors", "--save_every", 2]
    flags += ["--workers", workers, "--steps", steps, "--resume"]

    def parts(**options):
        return run(tmp_path / "o", *flags, "--out", tmp_path / "parts", world=world, module=module, **options)

    whole = aside(run, tmp_path / "w", *flags, "--out", tmp_path / "whole", world=world, module=module)
    if module == "train":
        parts(sabotage={world - 1: {1: "SIGKILL"}}, ok=KILLED)
        assert not (tmp_path / "parts" / "latest.pt").exists()
    parts(sabotage={0: {3: "SIGKILL"}}, ok=KILLED)
    # Of every second step there is a checkpoint, and before an evaluation, which distill.py has at the end alone.
    assert latest(tmp_path / "parts")["step"] == (2 if module == "distill" else 3)
    name = "SIGINT" if module == "distill" else "SIGTERM"
    stopped = 128 + getattr(signal, name), 128 + signal.SIGTERM
    _, output = parts(sabotage={world - 1: {4: name}}, ok=stopped)
    assert "stopped after step 5 and saved" in output and latest(tmp_path / "parts")["step"] == 5
    parts()
    whole.result()
    assert same_weights(tmp_path / "whole", tmp_path / "parts")
    assert log_of(tmp_path / "whole") == log_of(tmp_path / "parts")
    if module == "train":
        assert latest(tmp_path / "whole")["gan_optimizer"]["state"][0]["step"] == steps - 2


def test_a_run_that_dies_in_its_last_evaluation_catches_up(tmp_path, monkeypatch, smallest):
    flags = [*SMALL, "--steps", 1, "--out", tmp_path / "r"]
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(train, "evaluate", lambda *a, **kw: 1 / 0)
        command(train, *flags)
    assert latest(tmp_path / "r")["step"] == 1 and len(lines_of(tmp_path / "r" / "log.jsonl")) == 1
    command(train, *flags, "--resume")
    assert "eval" in lines_of(tmp_path / "r" / "log.jsonl")[-1] and (tmp_path / "r" / "metrics.json").exists()


@slow
def test_what_may_change_when_a_run_goes_on(tmp_path, smallest):
    """The number of steps, rates, paths: said. Not the model, its parts, the number of images."""
    for name, n in (("here", 6), ("there", 6), ("other", 7)):
        folder_of(tmp_path / name, n)
    flags = [*SMALL, "--eval_every", 0, "--data", tmp_path / "here", "--out", tmp_path / "r", "--steps", 2]
    command(train, *flags)
    assert "holds latest.pt already: continue that run with --resume" in sentence(train, *flags)
    for change, words in ((["--steps", 1], "has done its 2 steps"),
                          (["--loss", "fm"], "continues a run with --loss eqm, not fm"),
                          (["--data", tmp_path / "other"], "a run on 6 images, but"),
                          (["--w_gan", 0.1], "begun without the part 'gan'"),
                          (["--optimizer", "adamw"], "the part 'optimizer' of the checkpoint does not fit")):
        message = sentence(train, *flags, "--resume", "--steps", 3, *change)
        assert words in message and len(lines_of(tmp_path / "r" / "log.jsonl")) == 3, change
    os.rename(tmp_path / "r" / "model.safetensors", tmp_path / "model.safetensors")
    (tmp_path / "r" / "model.safetensors").symlink_to(tmp_path / "model.safetensors")
    before = (tmp_path / "model.safetensors").read_bytes()
    output = command(train, *flags, "--resume", "--steps", 3, "--data", tmp_path / "there", "--lr", 0.01)
    assert "resuming with --lr 0.01 instead of 0.001" in output and f"--data {tmp_path}/there instead of" in output
    assert latest(tmp_path / "r")["step"] == 3 and step_lines(tmp_path / "r")[-1]["lr"] == 0.01
    assert (tmp_path / "r" / "model.safetensors").is_symlink()  # written through to its target
    assert (tmp_path / "model.safetensors").read_bytes() != before


@slow
def test_a_bad_step_of_one_rank_is_skipped_on_all(tmp_path, smallest):
    flags = [*SMALL, "--eval_every", 0, "--steps", 3, "--w_gan", 0.1]
    _, output = run(tmp_path / "o", *flags, "--out", tmp_path / "a", world=2, sabotage={1: {1: "nan"}})
    assert output.count("not finite and are skipped") == 1
    log = step_lines(tmp_path / "a")
    assert [line["skipped"] for line in log] == [0, 1, 1] and log[1]["grad_norm"] is None
    state = latest(tmp_path / "a")
    assert state["skipped"] == 1
    assert state["optimizer"]["state"][0]["step"] == 2 == state["gan_optimizer"]["state"][0]["step"]
    assert state["model"]["decoder.norm_z.num_batches_tracked"] == 2
    assert all(v.isfinite().all() for part in ("model", "ema", "gan") for v in state[part].values())


@slow
def test_ten_to_nineteen_bad_steps_in_a_row_end_the_run(tmp_path, smallest):
    """Read every tenth step; the images of the last one are named."""
    flags = [*SMALL, "--size", 16, "--batch_size", 2, "--log_every", 100, "--save_every", 100, "--eval_every", 0]
    _, output = run(tmp_path / "o", *flags, "--steps", 40, "--out", tmp_path / "r", world=2, ok=(1,),
                    sabotage={0: dict.fromkeys(range(1, 40), "nan")})
    images = next(iter(data.make_loader(data.make_dataset("demo", 16, True), 2, True, start=19)))[1].tolist()
    last = output[output.index("error: "):]
    assert "19 steps in a row were skipped, being not finite, the last is 20, " in last and "eqm nan" in last
    assert f"images {', '.join(map(str, images))}:" in last and last.count("\n") == 1
    assert not (tmp_path / "r" / "latest.pt").exists()


def test_an_infinite_loss_with_finite_gradients_skips_the_step(tmp_path, monkeypatch, smallest):
    """KL may overflow where the encoder is frozen: no gradient shows it. Nothing is saved before a good step."""
    values, saves, save = iter([math.inf, math.inf, 0.0]), [], checkpoint_module.save_checkpoint
    monkeypatch.setattr(train, "kl_loss", lambda posterior: torch.tensor(next(values)))
    monkeypatch.setattr(checkpoint_module, "save_checkpoint", lambda out, state, ema: (saves.append(state["step"]),
                                                                                       save(out, state, ema)))
    DCSSDAE("dc_f8c4", "XS", enc_width=0.0625, depth=1).save(tmp_path / "m.safetensors")
    command(train, *SMALL, "--init_from", tmp_path / "m.safetensors", "--freeze_enc", "--steps", 3, "--save_every", 1,
            "--out", tmp_path / "r")
    state = latest(tmp_path / "r")
    assert state["optimizer"]["state"][0]["step"] == 1 and state["skipped"] == 2 and saves == [3]


def test_one_skipped_step_costs_no_other(tmp_path, monkeypatch, smallest):
    """Where a signal ends the run beside it, the steps before are saved."""
    done = iter(range(2))

    def skipped_and_stopped(posterior):
        if next(done) == 1:
            os.kill(os.getpid(), signal.SIGTERM)
            return torch.tensor(math.nan)
        return torch.tensor(0.0)

    monkeypatch.setattr(train, "kl_loss", skipped_and_stopped)
    with pytest.raises(AssertionError, match="(?s)143, .*stopped after step 2 and saved"):
        command(train, *SMALL, "--steps", 9, "--save_every", 50, "--out", tmp_path / "r")
    state = latest(tmp_path / "r")
    assert state["step"] == 2 and state["skipped"] == 1


@slow
def test_a_run_that_goes_wrong_leaves_its_good_state(tmp_path, monkeypatch, smallest):
    """Skipped steps, weights that are not finite, a full disk; weights that are finite and ruined."""
    good = tmp_path / "r"
    flags = [*SMALL, "--warmup", 0, "--eval_every", 1, "--save_every", 1, "--out", good, "--resume"]
    command(train, *flags, "--steps", 2)
    kept = {name: (good / name).read_bytes() for name in ("latest.pt", "previous.pt", "model.safetensors")}
    best = DCSSDAE.load(good / "best.safetensors")
    rows = [line["eval"][-1] for line in lines_of(good / "log.jsonl") if "eval" in line]
    note = best.config["notes"]["best"]
    assert note["metric"] == "psnr" and note["value"] == max(row["psnr"] for row in rows)
    assert note["images"] == 2 and note["decoding_steps"] == 1

    def full(state, file):
        file.write(b"half a checkpoint")
        raise OSError(errno.ENOSPC, "No space left on device")

    for module, name, broken, words in (
        (train, "kl_loss", lambda posterior: torch.tensor(math.nan), "the last 2 steps were skipped"),
        (train.Average, "update", lambda self, *a: self.averages[0].fill_(math.nan),
         "after step 3 the weights of the part 'ema' are not finite"),
        (torch, "save", full, "No space left on device): make room and continue with --resume"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(module, name, broken)
            assert words in sentence(train, *flags, "--steps", 4)
        assert all((good / name).read_bytes() == content for name, content in kept.items()), words
    with monkeypatch.context() as patch:
        patch.setattr(train.Average, "update", lambda self, *a: [p.fill_(9.0) for p in self.averages])
        command(train, *flags, "--steps", 3)
    assert (good / "latest.pt").read_bytes() != kept["latest.pt"]
    after = DCSSDAE.load(good / "best.safetensors")
    assert after.config == best.config
    assert all(torch.equal(a, b) for a, b in zip(after.state_dict().values(), best.state_dict().values()))


def test_data_that_one_process_loses_ends_all(tmp_path, smallest):
    """Both save what they have done, and say it once."""
    codes, output = run(tmp_path / "o", *SMALL, "--save_every", 100, "--eval_every", 0, "--steps", 5, "--out",
                        tmp_path / "r", world=2, ok=(1,), sabotage={1: {2: "lost"}})
    assert codes == [1, 1] and "error: " not in output
    said = (tmp_path / "o" / "output1").read_text()
    assert said.count("error: ") == 1 and "Stale file handle" in said and "Traceback" not in said
    assert latest(tmp_path / "r")["step"] == 2 and (tmp_path / "r" / "model.safetensors").exists()
