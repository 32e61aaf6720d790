"""Files, processes, flags, checkpoints and logs: what no crash, signal, full disk or damaged file may cost.

    python -m pytest plumbing
"""
import argparse
import contextlib
import json
import math
import multiprocessing
import os
import pickle
import random
import signal
import sys
import time
import types

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn

from plumbing import checkpoint, files, flags, log, optim, process
from plumbing.checkpoint import WRITTEN, load_checkpoint, newest_checkpoint, save_checkpoint

posix = pytest.mark.skipif(os.name != "posix", reason="signals, locks and limits are POSIX's")
FORKS = multiprocessing.get_context("fork" if os.name == "posix" else None)
torch.set_num_threads(1)


class Weights(nn.Linear):
    """The least that is saved as a model."""

    def __init__(self, number=0.0, size=1):
        super().__init__(size, 1, bias=False)
        nn.init.constant_(self.weight, number)

    def save(self, path):
        with files.whole(path) as temporary:
            save_file(self.state_dict(), temporary)


def state_of(step, **more):
    return {"step": step, "args": {}, "skipped": 0, **more}


# ---------------------------------------------------------------------------------------------------------------------
# files.py

def test_a_file_is_whole_or_as_it_was(tmp_path):
    path = tmp_path / "a.txt"
    files.write_text(path, "first")
    with pytest.raises(KeyboardInterrupt), files.whole(path) as temporary, open(temporary, "w") as file:
        file.write("half of the sec")
        assert path.read_text() == "first"
        raise KeyboardInterrupt
    assert path.read_text() == "first" and os.listdir(tmp_path) == ["a.txt"]


@posix
def test_writing_through_a_link_replaces_its_target(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    link, target = tmp_path / "link.txt", tmp_path / "elsewhere" / "target.txt"
    target.write_text("old")
    link.symlink_to(target)
    files.write_text(link, "new")
    assert link.is_symlink() and target.read_text() == "new" and os.listdir(target.parent) == ["target.txt"]
    (tmp_path / "to_nothing").symlink_to(tmp_path / "made.txt")
    files.write_text(tmp_path / "to_nothing", "new")
    assert (tmp_path / "made.txt").read_text() == "new"


def test_json_has_null_for_what_is_not_finite(tmp_path):
    files.write_json(tmp_path / "a.json", {"a": math.nan, "b": [1.5, (math.inf, -math.inf)], "c": "NaN"})
    assert json.loads((tmp_path / "a.json").read_text()) == {"a": None, "b": [1.5, [None, None]], "c": "NaN"}


def test_a_grid_has_rows_of_images_with_white_between_them(tmp_path):
    rows = [torch.stack([torch.full((3, 4, 6), value) for value in values]) for values in ((-2.0, 0.5), (7.0,))]
    files.save_grid(tmp_path / "grid.png", rows)
    grid = Image.open(tmp_path / "grid.png")
    assert grid.size == (2 * 8 + 2, 2 * 6 + 2)
    centres = [grid.getpixel((2 + 8 * column + 3, 2 + 6 * row + 2))[0] for row in range(2) for column in range(2)]
    assert centres == [0, 191, 255, 255] and grid.getpixel((0, 0)) == (255, 255, 255)


class Payload:
    """Makes a folder where a pickle is executed."""
    def __reduce__(self):
        return os.mkdir, ("executed",)


def test_weight_files_are_read_without_running_code(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    weights = {"w": torch.arange(3.0)}
    save_file(weights, "a.safetensors", metadata={"config": "{}"})
    torch.save(weights, "a.pth")
    for name, metadata in (("a.safetensors", {"config": "{}"}), ("a.pth", {})):
        found, found_metadata = files.read_tensors(name)
        assert torch.equal(found["w"], weights["w"]) and found_metadata == metadata
    assert files.sha256("a.pth") == files.sha256(tmp_path / "a.pth") != files.sha256("a.safetensors")
    torch.save({"w": Payload()}, "code.pth")
    with open("old_code.pth", "wb") as file:
        pickle.dump({"w": Payload()}, file, protocol=2)
    for name in ("junk.safetensors", "junk.pth", "empty.pth", "cut.pth"):
        (tmp_path / name).write_bytes({"j": b"junk", "e": b"", "c": (tmp_path / "a.pth").read_bytes()[:200]}[name[0]])
    for name, words in (("code.pth", "code.pth is refused"), ("old_code.pth", "old_code.pth is refused"),
                        *((f"junk.{kind}", "junk") for kind in ("safetensors", "pth")),
                        ("empty.pth", "empty.pth"), ("cut.pth", "cut.pth")):
        with pytest.raises(ValueError, match=words):
            files.read_tensors(name)
    assert not os.path.exists("executed")
    with pytest.raises(FileNotFoundError, match="no weight file at none.pth"):
        files.read_tensors("none.pth")


def test_a_networks_file_is_given_or_cached_or_downloaded(tmp_path, monkeypatch):
    url, fetched = "https://example.org/models/net-12345678.pth", []

    def download(url, path, digest, progress):
        fetched.append(digest)
        raise OSError("no route to host")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    with pytest.raises(files.WeightsUnavailable, match=r"net-12345678.pth is not in .*example.org \(no route to host\)"
                                                       ": give it with --net FILE"):
        files.downloaded(url, None, "--net")
    with pytest.raises(files.WeightsUnavailable, match="--net: no weight file missing.pth"):
        files.downloaded(url, "missing.pth", "--net")
    cached = tmp_path / "hub" / "checkpoints" / "net-12345678.pth"
    cached.write_bytes(b"weights")
    assert files.downloaded(url, None, "--net") == str(cached)
    assert files.downloaded(url, cached, "--net") == cached
    assert fetched == ["12345678"]


def test_files_of_the_hugging_face_hub(monkeypatch):
    hub = types.SimpleNamespace(hf_hub_download=lambda repo, name: f"/cache/{repo}/{name}")
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    assert files.local_file("hf://owner/repo/a/b.pth") == "/cache/owner/repo/a/b.pth"
    assert files.local_file("a/b.pth") == "a/b.pth"
    with pytest.raises(ValueError, match="hf://owner/repo names no file: give hf://owner/repo/file"):
        files.local_file("hf://owner/repo")
    hub.hf_hub_download = lambda repo, name: 1 / 0
    with pytest.raises(files.WeightsUnavailable, match="download a/b.pth from https://huggingface.co/owner/repo and"):
        files.local_file("hf://owner/repo/a/b.pth")


# ---------------------------------------------------------------------------------------------------------------------
# flags.py

@pytest.mark.parametrize("kind,right,wrong", [
    (flags.positive, ["1", "1e-9", "0.5"], ["0", "-1", "nan", "inf", "x", ""]),
    (flags.not_negative, ["0", "0.5"], ["-0.1", "nan", "inf", "x"]),
    (flags.fraction, ["0", "0.5", "1"], ["-0.1", "1.1", "nan", "x"]),
    (flags.below_one, ["0", "0.999"], ["1", "-0.1", "nan"]),
    (flags.count, ["1", "20"], ["0", "-1", "1.5", "x", ""]),
    (flags.natural, ["0", "20"], ["-1", "1.5", "x"]),
])
def test_types_of_flags(kind, right, wrong, capsys):
    p = flags.make_parser("A program.\n\nMore of it.")
    p.add_argument("--flag", type=kind, help="a number")
    for text in right:
        assert p.parse_args(["--flag", text]).flag == float(text)
    for text in wrong:
        with pytest.raises(SystemExit) as stop:
            p.parse_args([f"--flag={text}"])
        message = capsys.readouterr().err.splitlines()[-1]
        assert stop.value.code == 2 and "argument --flag: " in message
    text = p.format_help()
    assert "A program." in text and "More of it" not in text and f"--flag {kind.__name__}" in text


# ---------------------------------------------------------------------------------------------------------------------
# process.py

def outcome_of(error):
    """What a program prints where its main raises this."""
    def main():
        raise error
    with pytest.raises(SystemExit) as stop:
        process.guarded(main)
    return stop.value.code


def test_what_a_user_can_mend_is_one_sentence(monkeypatch):
    assert outcome_of(ValueError("--size 7 is odd")) == "error: --size 7 is odd"
    assert outcome_of(FileNotFoundError("no file at x")) == "error: no file at x"
    memory = torch.OutOfMemoryError("CUDA out of memory. Tried\nmore lines")
    assert outcome_of(memory).startswith("error: CUDA out of memory. Tried: out of memory: use a smaller --batch_size")
    assert outcome_of(KeyboardInterrupt()) == "interrupted"
    with pytest.raises(TypeError, match="a mistake of ours"):  # Python's own traceback
        outcome_of(TypeError("a mistake of ours"))
    monkeypatch.setenv("TRACEBACK", "1")
    with pytest.raises(ValueError, match="odd"):
        outcome_of(ValueError("--size 7 is odd"))


def test_devices_and_their_types(monkeypatch):
    with pytest.raises(ValueError, match="--device cuda: there is no such device here|--device mps"):
        process.setup("mps" if torch.cuda.is_available() else "cuda")
    with pytest.raises(ValueError, match="--device abacus"):
        process.setup("abacus")
    monkeypatch.setenv("SLURM_NTASKS", "2"), monkeypatch.setenv("SLURM_PROCID", "0")
    with pytest.raises(ValueError, match="one torchrun a node"):
        process.setup("cpu")
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: True)
    for capability, dtype in (((7, 5), None), ((8, 0), torch.bfloat16), ((9, 0), torch.bfloat16)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, found=capability: found)
        assert process.pick_dtype("auto", torch.device("cuda")) is dtype
        assert process.pick_dtype("bf16", torch.device("cuda")) is torch.bfloat16
        assert process.pick_dtype("float32", torch.device("cuda")) is None
    monkeypatch.setattr(torch, "compile", lambda function: lambda x: 1 / 0)
    with pytest.raises(ValueError, match="--compile does not work here .division by zero.*--no-compile"):
        process.check_compiler(torch.device("cpu"))


def test_readers_get_half_of_the_processors(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: range(24), raising=False)
    for processes, workers in (("1", 8), ("4", 3), ("24", 0)):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", processes)
        assert process.default_workers() == workers


@pytest.mark.parametrize("ddp", [
    lambda module, gradient_as_bucket_view, forward_sync_buffers: (gradient_as_bucket_view, forward_sync_buffers),
    lambda module, gradient_as_bucket_view, broadcast_buffers: (gradient_as_bucket_view, broadcast_buffers)])
def test_ddp_gets_the_option_that_this_torch_has(monkeypatch, ddp):
    monkeypatch.setattr(nn.parallel, "DistributedDataParallel", ddp)
    assert process.data_parallel(None, 2) == (True, False) and process.data_parallel("module", 1) == "module"


def test_all_processes_end_with_the_error_of_one(monkeypatch):
    monkeypatch.setattr(process, "gathered", lambda value, world: [value, "another digest", True])
    with pytest.raises(ValueError, match="the processes have different flags"):
        process.same_everywhere({"lr": 1}, "flags", 2)
    with pytest.raises(OSError, match="the disk"):
        process.raise_together(OSError("the disk"), 2)
    with pytest.raises(SystemExit) as stop:
        process.raise_together(None, 2)
    assert stop.value.code == 1
    monkeypatch.setattr(process, "gathered", lambda value, world: [value, value])
    process.same_everywhere({"lr": 1}, "flags", 2)
    process.raise_together(None, 2)


@posix
@pytest.mark.parametrize("name", process.STOP_SIGNALS)
def test_signals_ask_a_run_to_stop(name):
    number = getattr(signal, name)
    before = {each: signal.getsignal(getattr(signal, each)) for each in process.STOP_SIGNALS}
    try:
        for each in before:  # nohup, or a shell in the background, may have started the tests
            signal.signal(getattr(signal, each), signal.SIG_DFL)
        stop = process.StopSignal()
        assert stop.received == 0
        os.kill(os.getpid(), number)
        assert stop.received == number
        # The second Ctrl-C is the system's own; other signals may come twice (schedulers send them so).
        assert (signal.getsignal(number) == signal.SIG_DFL) == (name == "SIGINT")
        signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
        process.StopSignal()
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
        process.leave_signals_to_parent(0)
        os.kill(os.getpid(), number)
    finally:
        for each, handler in before.items():
            signal.signal(getattr(signal, each), handler)


# ---------------------------------------------------------------------------------------------------------------------
# log.py

def test_a_log_goes_on_after_the_last_checkpoint(tmp_path):
    run = log.Log(tmp_path, 0)
    for step in (1, 2, 3):
        run.write(step, loss=math.nan if step == 2 else 0.5)
    run.write(3, eval=[{"psnr": 20.0}])
    with open(tmp_path / "log.jsonl", "a") as file:
        file.write('{"step": 1')  # cut off by a kill
    assert log.last_evaluation(tmp_path, 3) == 3 and log.last_evaluation(tmp_path, 2) is None
    log.Log(tmp_path, 2).write(3, loss=0.25)
    lines = [json.loads(line) for line in open(tmp_path / "log.jsonl")]
    assert lines == [{"step": 1, "loss": 0.5}, {"step": 2, "loss": None}, {"step": 3, "loss": 0.25}]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="a device of Linux")
def test_a_log_on_a_full_disk_is_a_warning(tmp_path, capsys):
    run = log.Log(tmp_path, 0)
    run.path = "/dev/full"
    run.write(3, loss=1.0)
    assert "warning: could not write to /dev/full: No space left on device" in capsys.readouterr().out


def test_progress_where_nobody_watches_is_a_line_now_and_then(capsys):
    bar = log.progress(2000, "step")
    for step in range(2000):
        bar.update()
        bar.set_postfix_str(f"loss {step}", refresh=False)
    bar.close()
    text = capsys.readouterr().err
    assert "\r" not in text and 1 <= len(text.splitlines()) <= 3 and "2000/2000" in text.splitlines()[-1]
    assert log.progress(3, "step", disable=True).disable


# ---------------------------------------------------------------------------------------------------------------------
# checkpoint.py

@pytest.fixture
def out(tmp_path):
    """A folder, and no lock of this process in the end."""
    yield tmp_path
    while checkpoint.held_locks:
        checkpoint.held_locks.pop().close()


@pytest.mark.parametrize("name", WRITTEN)
def test_a_folder_that_holds_results_is_not_used_unasked(out, name):
    (out / name).write_bytes(b'{"step": 1}\n')
    with pytest.raises(ValueError, match=f"holds {name} already: continue that run with --resume, or choose another"):
        newest_checkpoint(out, resume=False)
    if name == "log.jsonl":  # of a run that was killed before its first checkpoint
        assert newest_checkpoint(out, resume=True) is None
    elif not name.endswith(".pt"):
        with pytest.raises(ValueError, match=f"holds {name} but no checkpoint"):
            newest_checkpoint(out, resume=True)
        (out / f"latest.pt.7{files.UNFINISHED}").write_bytes(b"killed in its first save, between its two files")
        assert newest_checkpoint(out, resume=True) is None
    assert (out / name).exists() or name.endswith(".pt")


def test_only_our_own_temporary_files_go(out):
    (out / "thesis.tmp").write_text("a year")
    (out / "folder.tmp").mkdir()
    (out / f"latest.pt.123{files.UNFINISHED}").write_bytes(b"of a killed run")
    assert newest_checkpoint(out, resume=False) is None and newest_checkpoint(out / "deeper", resume=True) is None
    assert sorted(os.listdir(out)) == [".lock", "deeper", "folder.tmp", "thesis.tmp"]
    assert (out / "thesis.tmp").read_text() == "a year"


@pytest.mark.parametrize("damage", [b"", b"damaged", "half", "a flipped bit", "code"])
def test_a_damaged_checkpoint_is_set_aside_for_the_one_before(out, capsys, damage):
    for step in (1, 2):
        save_checkpoint(out, state_of(step, weights=torch.ones(100_000)), Weights())
    latest = out / "latest.pt"
    content = bytearray(latest.read_bytes())
    if damage == "half":
        content = content[:len(content) // 2]
    elif damage == "a flipped bit":
        content[len(content) // 2] ^= 1
    else:
        content = damage
    if damage == "code":
        torch.save({"step": Payload()}, latest)
    else:
        latest.write_bytes(content)
    path = newest_checkpoint(out, resume=True)
    assert path == os.path.join(out, "previous.pt") and load_checkpoint(path)["step"] == 1
    assert "latest.pt.damaged" in capsys.readouterr().err and (out / "latest.pt.damaged").exists()
    (out / "previous.pt").write_bytes(b"")
    with pytest.raises(ValueError, match="no readable checkpoint in .*start again with another --out"):
        newest_checkpoint(out, resume=True)
    assert not os.path.exists("executed")


@pytest.mark.skipif(not os.path.exists("/proc/self/maps"), reason="of Linux")
def test_a_checkpoint_is_mapped_not_copied(tmp_path):
    save_checkpoint(tmp_path, state_of(1, weights=torch.ones(100_000)), Weights())
    state = load_checkpoint(tmp_path / "latest.pt")
    assert "latest.pt" in open("/proc/self/maps").read() and state["weights"].sum() == 100_000


@posix
@pytest.mark.parametrize("small,large", [("checkpoint", "model"), ("model", "checkpoint")])
def test_a_full_disk_leaves_what_was_there(tmp_path, small, large):
    """A limit on the size of files stands for the full disk: the system's error, in the midst of writing."""
    import resource
    save_checkpoint(tmp_path, state_of(1), Weights())
    old = (tmp_path / "model.safetensors").read_bytes()
    limits, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    numbers = {small: 1, large: 300_000}
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, limits[1]))
    try:
        with pytest.raises(OSError, match=r"could not write a checkpoint .*File too large.*make room and continue"):
            save_checkpoint(tmp_path, state_of(2, weights=torch.zeros(numbers["checkpoint"])),
                            Weights(size=numbers["model"]))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert load_checkpoint(tmp_path / "latest.pt")["step"] == 1
    assert (tmp_path / "model.safetensors").read_bytes() == old
    assert sorted(os.listdir(tmp_path)) == ["latest.pt", "model.safetensors"]


def saver(out, step):
    """Save as fast as possible; the checkpoint and the model carry the same number. Pauses around the renaming, or no
    kill would ever come there."""
    replace = os.replace

    def slowly(a, b):
        time.sleep(0.01)
        replace(a, b)
        time.sleep(0.01)

    os.replace = slowly
    while True:
        step += 1
        save_checkpoint(out, state_of(step, weights=torch.full((500_000,), float(step))), Weights(step))


@posix
def test_kill_at_random_moments_of_saving(out):
    """KILLS=50 python -m pytest plumbing -k kill_at_random"""
    rng, step = random.Random(0), 0
    save_checkpoint(out, state_of(0, weights=torch.zeros(1)), Weights())
    for _ in range(int(os.environ.get("KILLS", "5"))):
        child, saved = FORKS.Process(target=saver, args=(out, step)), step
        child.start()
        deadline = time.time() + 60
        while saved == step:
            assert child.is_alive() and time.time() < deadline
            time.sleep(0.01)
            with contextlib.suppress(FileNotFoundError):  # between its two renames
                saved = load_checkpoint(out / "latest.pt")["step"]
        time.sleep(0.3 * rng.random())
        child.kill()
        child.join()
        state = load_checkpoint(newest_checkpoint(out, resume=True))
        assert (state["weights"] == state["step"]).all() and state["step"] > step
        weights, _ = files.read_tensors(out / "model.safetensors")
        assert weights["weight"].item() in (state["step"], state["step"] + 1)
        assert not list(out.glob("*.damaged")) and not list(out.glob(f"*{files.UNFINISHED}"))
        step = state["step"]


def lock_and_wait(folder, locked):
    checkpoint.lock_folder(folder)
    locked.set()
    time.sleep(60)


@posix
def test_two_runs_into_one_folder(out):
    """Refused while the first lives, and not a moment longer, even if it is killed."""
    locked = FORKS.Event()
    other = FORKS.Process(target=lock_and_wait, args=(out, locked))
    other.start()
    try:
        assert locked.wait(60)
        with pytest.raises(ValueError, match="another run is writing into"):
            newest_checkpoint(out, resume=False)
    finally:
        other.kill()
        other.join()
    assert newest_checkpoint(out, resume=False) is None


def test_flags_that_may_differ_in_silence(capsys):
    """Where a run writes, that it is resumed, and what older checkpoints do not know."""
    args = argparse.Namespace(lr=0.1, out="y", resume=True, data="d")
    checkpoint.compare_flags({"images": 6, "args": {"lr": 0.1, "out": "x", "resume": False}}, args, (), 6)
    assert capsys.readouterr().err == ""


def test_parts_that_do_not_fit_a_checkpoint_are_refused():
    linear = nn.Linear(2, 2)
    parts = {"model": linear, "gan": None, "optimizer": torch.optim.AdamW(linear.parameters(), lr=0.5)}
    good = {name: part and part.state_dict() for name, part in parts.items()}
    checkpoint.restore(parts, good)
    for change, words in (({"model": nn.Linear(3, 2).state_dict()}, "part 'model' of the checkpoint does not fit"),
                          ({"gan": {}}, "begun with the part 'gan'"), ({"optimizer": None}, "begun without the part")):
        with pytest.raises(ValueError, match=words):
            checkpoint.restore(parts, good | change)


def test_a_resumed_optimiser_must_train_the_same_weights():
    """Moments of others would be taken for theirs: torch compares numbers of weights, where it is asked to."""
    layers = nn.Sequential(nn.Linear(16, 8), nn.Linear(8, 4))
    whole, same = (optim.make_optimizers([*layers.parameters()], "adamw", lr, 0.1, torch.device("cpu"))["optimizer"]
                   for lr in (1e-3, 5e-4))
    for p in layers.parameters():
        p.grad = torch.ones_like(p)
    whole.step()
    checkpoint.restore({"optimizer": same}, {"optimizer": whole.state_dict()})
    assert same.param_groups[0]["lr"] == 5e-4 and same.state[layers[0].weight]["exp_avg"].shape == (8, 16)
    part = optim.make_optimizers([*layers[1].parameters()], "adamw", 1e-3, 0.1, torch.device("cpu"))["optimizer"]
    with pytest.raises(ValueError, match="the part 'optimizer' of the checkpoint does not fit"):
        checkpoint.restore({"optimizer": part}, {"optimizer": whole.state_dict()})


def test_lines_of_a_log_that_a_full_disk_has_cut(tmp_path):
    whole = '{"step": 1, "loss": 1.0}\n', '{"step": 4, "eval": []}\n'
    cut = '{"step": 2, "lo{"step": 3, "loss": 1.0}\n', "\0\0\0}\n"
    (tmp_path / "log.jsonl").write_text(whole[0] + "".join(cut) + whole[1] + '{"step": 5}')
    assert log.read_lines(tmp_path / "log.jsonl") == [*whole] and log.last_evaluation(tmp_path, 9) == 4


def test_a_linked_checkpoint_is_not_lost(tmp_path):
    """The link stays, its target is the new one, and the old one is previous.pt."""
    target = tmp_path / "elsewhere.pt"
    torch.save({"step": 1}, target)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "latest.pt").symlink_to(target)
    checkpoint.save_checkpoint(tmp_path / "run", {"step": 2}, Weights())
    steps = [torch.load(tmp_path / "run" / name)["step"] for name in ("latest.pt", "previous.pt")]
    assert steps == [2, 1] and (tmp_path / "run" / "latest.pt").is_symlink()


def test_what_says_nothing_about_a_checkpoint(tmp_path, monkeypatch):
    """No memory for a map of the file is no damage: it keeps its name, and the run ends."""
    path = tmp_path / "latest.pt"
    torch.save({"step": 1}, path)

    def load(*arguments, **options):
        raise RuntimeError("unable to mmap 64 bytes from file: Cannot allocate memory (12)")

    monkeypatch.setattr(torch, "load", load)
    with pytest.raises(OSError, match="Cannot allocate memory"):
        checkpoint.newest_checkpoint(tmp_path, True)
    assert path.exists()
