"""Tests of what must survive: interruption, bad input, a full disk, several processes."""

import contextlib
import errno
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import tasks
import vcopd

HERE = Path(vcopd.__file__).parent

# =============================================================================================
# Helpers: a base of some thousand parameters, and whole runs of a second
# =============================================================================================


@pytest.fixture(scope="session")
def base(tmp_path_factory) -> Path:
    """A random model and a tokenizer in a folder, as --model takes it."""
    folder, rng = tmp_path_factory.mktemp("base"), random.Random(0)
    texts = [text for _ in range(100) for text in tasks.sum_document(rng)]
    tokenizer = vcopd.train_tokenizer(texts, 280)
    recipe = {**vcopd.TINY_RECIPE, "hidden": 16, "layers": 1, "heads": 2}
    vcopd.new_tiny(tokenizer, recipe).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def even_length(example, answer: str) -> tasks.Verdict:
    """A verifier of which a random model gets some right."""
    right = len(answer) % 2 == 0
    return tasks.Verdict(2.0 * right - 1, right, True, "ok" if right else "wrong", {})


def small_task() -> tasks.Task:
    """Arithmetic with an easy verifier and little to evaluate."""
    task = tasks.arithmetic()
    return replace(task, verify=even_length, anchors=task.anchors[::20],
                   benchmark=task.benchmark[25::20])


@pytest.fixture
def small(monkeypatch):
    """The small task under the name of arithmetic."""
    monkeypatch.setitem(tasks.TASKS, "arithmetic", small_task)


@pytest.fixture(scope="session")
def whole(base, tmp_path_factory) -> dict[str, Path]:
    """For two methods, the folder of a run that nothing disturbed."""
    folders = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(tasks.TASKS, "arithmetic", small_task)
        for method in ("vcopd", "sft"):
            folders[method] = tmp_path_factory.mktemp("whole") / method
            assert run(options(base, folders[method], "--method", method)) == 0
    return folders


@pytest.fixture
def done(whole, small, tmp_path) -> Path:
    """A copy of such a run, to spoil."""
    return shutil.copytree(whole["vcopd"], tmp_path / "run")


def options(base: Path, out: Path, *more: str) -> list[str]:
    """A command line for a run of six steps that takes about a second."""
    return ["--task", "arithmetic", "--model", str(base), "--out", str(out), "--steps", "6",
            "--prompts", "2", "--rollouts", "2", "--max-new-tokens", "6", "--eval-problems", "2",
            "--save-every", "2", "--eval-every", "4", "--lr", "0.01", "--lora-rank", "2",
            "--format-threshold", "0", *more,
            *([] if "sft" in more else ["--replay-every", "3"])]


def run(arguments: list[str]) -> int:
    """What `python vcopd.py ARGUMENTS` does, in this process: its exit code."""
    try:
        return vcopd.main(*vcopd.read_config(arguments))
    except SystemExit as stop:
        return stop.code


def results(out: Path) -> tuple:
    """All that a run leaves which must not depend on its history."""
    report = json.loads((out / "report.json").read_text("utf-8"))
    names = ("metrics.jsonl", "samples.jsonl", "adapter/adapter_model.safetensors")
    return report["before"], report["after"], *((out / name).read_bytes() for name in names)


def in_child(function, *args) -> int:
    """Call it in a forked process that can die without harm: its wait status."""
    pid = os.fork()
    if pid == 0:
        tasks.pool.cache_clear()  # the judge's servers belong to the parent
        quiet = os.open(os.devnull, os.O_WRONLY)
        os.dup2(quiet, 1)
        os.dup2(quiet, 2)
        try:
            os._exit(function(*args) or 0)
        except BaseException:
            os._exit(99)
    return os.waitpid(pid, 0)[1]


class FailingSync:
    """os.fsync that does something dreadful when it is called for the nth time."""

    def __init__(self, nth: int, dreadful):
        self.left, self.dreadful, self.real = nth, dreadful, os.fsync

    def __call__(self, fd: int) -> None:
        self.left -= 1
        if self.left == 0:
            self.dreadful(fd)
        self.real(fd)


def cut_and_die(fd: int) -> None:
    """SIGKILL while the file is written: its last bytes are missing."""
    with contextlib.suppress(OSError):  # a folder
        os.ftruncate(fd, max(os.fstat(fd).st_size - 7, 0))
    os.kill(os.getpid(), signal.SIGKILL)


def run_and_die(arguments: list[str], nth: int) -> int:
    """A run that is killed at its nth write."""
    os.fsync = FailingSync(nth, cut_and_die)
    return run(arguments)


def one_error(capsys) -> str:
    """The only line on the error stream besides progress bars; it is no traceback."""
    lines = [line for line in capsys.readouterr().err.splitlines() if line and "%|" not in line]
    assert len(lines) == 1, lines
    assert lines[0].startswith("vcopd.py: ") and "Traceback" not in lines[0]
    return lines[0]


# =============================================================================================
# Interruption
# =============================================================================================


# The writes of a run: 2 for each of config, metrics, samples, and checkpoint 0, then 1 or 2 for
# each step's lines and 2 for each checkpoint.
@pytest.mark.parametrize(("method", "nth"), [("vcopd", 3), ("vcopd", 15), ("sft", 13)])
def test_a_run_killed_while_it_writes_ends_as_if_nothing_had_happened(
        method, nth, base, whole, small, tmp_path):
    """Killed before the first checkpoint, in a line of metrics, in a checkpoint; then resumed."""
    out = tmp_path / "killed"
    arguments = options(base, out, "--method", method)
    assert in_child(run_and_die, arguments, nth) == signal.SIGKILL
    assert not (out / "report.json").exists()
    assert run(["--resume", str(out)]) == 0
    assert results(out) == results(whole[method])
    assert not list(out.glob("**/*.new"))


@pytest.mark.parametrize("damage", [lambda data: data[:-20], lambda data: b"",
                                    lambda data: data[:99] + b"\0" + data[100:]])
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(
        damage, whole, done, capsys):
    """A disk may lose what it said was written. Half a state would train on, to a wrong end."""
    newest = done / "checkpoint" / "00000006.pt"
    newest.write_bytes(damage(newest.read_bytes()))
    (done / "report.json").unlink()
    assert run(["--resume", str(done)]) == 0
    printed = capsys.readouterr().out
    assert f"{newest} is damaged" in printed and "resuming after step 4" in printed
    assert results(done) == results(whole["vcopd"])


def test_two_checkpoints_are_kept(done):
    """One to go on from, and one for when that is damaged; more would fill the disk."""
    names = [path.name for path in sorted((done / "checkpoint").iterdir())]
    assert names == ["00000004.pt", "00000006.pt"]


def test_a_finished_run_says_so_and_can_be_prolonged(base, whole, done, tmp_path, capsys):
    """--resume in a script's loop must end; 6 steps and 2 more are 8 steps."""
    assert run(["--resume", str(done)]) == 0
    assert "is finished" in capsys.readouterr().out
    assert results(done) == results(whole["vcopd"])
    assert run(["--resume", str(done), "--steps", "8"]) == 0
    assert run(options(base, tmp_path / "straight", "--steps", "8")) == 0
    assert results(done) == results(tmp_path / "straight")
    assert run(["--resume", str(done)]) == 0  # 8 is now what it was asked for


def test_a_new_run_destroys_no_other(base, whole, done, capsys):
    """A newcomer repeats the same command; somebody else forgets --out after changing --lr."""
    assert run(options(base, done)) == 0  # the same again: the same results
    assert results(done) == results(whole["vcopd"])
    capsys.readouterr()
    assert run(options(base, done, "--lr", "0.02")) == 2
    assert "--out" in one_error(capsys)
    report = (done / "report.json").read_bytes()
    (done / "report.json").unlink()
    assert run(options(base, done)) == 2
    assert f"--resume {done}" in one_error(capsys)
    (done / "report.json").write_bytes(report)
    assert results(done) == results(whole["vcopd"])


@pytest.mark.parametrize(("where", "nth", "saved"), [
    ("sample", 1, False), ("evaluate", 1, False), ("train_step", 3, True),
    ("verify_all", 10, True), ("refresh_replay", 2, True), ("probe", 1, True),
    ("evaluate", 2, True)])
def test_ctrl_c_anywhere_leaves_a_run_that_goes_on_to_the_same_end(
        where, nth, saved, base, whole, small, tmp_path, monkeypatch, capsys):
    """Sampling, judging, training, evaluation: each is a place where people lose patience."""
    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(vcopd, where, Pressed(getattr(vcopd, where), nth))
        capsys.readouterr()
        assert run(options(base, out)) == 130
    assert f"python vcopd.py --resume {out}" in capsys.readouterr().out
    assert bool(list(out.glob("checkpoint/*.pt"))) == saved
    assert run(["--resume", str(out)]) == 0
    assert results(out) == results(whole["vcopd"])


class Pressed:
    """A function during whose nth call Ctrl-C is pressed, so many times."""

    def __init__(self, function, nth: int, times: int = 1):
        self.function, self.left, self.times = function, nth, times

    def __call__(self, *args):
        self.left -= 1
        for _ in range(self.times if self.left == 0 else 0):
            os.kill(os.getpid(), signal.SIGINT)
        return self.function(*args)


def test_a_second_ctrl_c_ends_at_once(base, small, tmp_path, monkeypatch):
    """A step of a large model takes minutes."""
    monkeypatch.setattr(vcopd, "sample", Pressed(vcopd.sample, 9, times=2))
    monkeypatch.setattr(vcopd, "probe", None)  # must not come to that
    handler = signal.getsignal(signal.SIGINT)
    assert run(options(base, tmp_path / "run", "--eval-every", "1")) == 130
    assert signal.getsignal(signal.SIGINT) is handler


def test_ctrl_c_before_anything_was_begun_does_not_promise_a_resume(
        base, small, tmp_path, monkeypatch, capsys):
    """While the base is built there is nothing to go on with."""
    monkeypatch.setattr(vcopd, "load_policy", Pressed(vcopd.load_policy, 1))
    assert run(options(base, tmp_path / "run")) == 130
    assert "same command again" in capsys.readouterr().out


def descendants(pid: int) -> set[int]:
    """All processes below one, by /proc."""
    parents = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            parents[int(path.parent.name)] = int(path.read_text().rpartition(")")[2].split()[1])
    found = {pid}
    while more := {p for p, parent in parents.items() if parent in found} - found:
        found |= more
    return found - {pid}


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks for processes in /proc")
def test_ctrl_c_leaves_no_process_behind(base, tmp_path):
    """The judge's servers run in sessions of their own, where Ctrl-C does not reach them."""
    process = subprocess.Popen(
        [sys.executable, HERE / "vcopd.py", *options(base, tmp_path / "run", "--task", "codeedit",
                                                     "--steps", "1000")],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    for line in process.stdout:
        if line.split()[:1] == ["2"]:
            break
    servers = descendants(process.pid)
    process.send_signal(signal.SIGINT)
    printed, _ = process.communicate(timeout=30)
    assert process.returncode == 130
    assert f"python vcopd.py --resume {tmp_path / 'run'}" in printed and "Traceback" not in printed
    assert servers and not any(Path(f"/proc/{pid}").exists() for pid in servers)


# =============================================================================================
# Guards
# =============================================================================================


@pytest.mark.parametrize(("epoch", "saved"), [(0, 3), (1, 2)])
def test_a_loss_that_is_not_finite_stops_with_step_examples_and_a_saved_state(
        epoch, saved, base, whole, small, tmp_path, monkeypatch, capsys):
    """Step 4 fails. Its first epoch leaves the state of step 3, which is saved; its second finds
    the weights changed already, and step 2 stands. Neither takes the step.
    """
    out, losses, nll_loss = tmp_path / "run", [], vcopd.nll_loss

    def bad(*args):
        losses.append(nll_loss(*args))
        return losses[-1] * (math.nan if len(losses) == 1 + 2 * 3 + epoch else 1)

    cfg, _ = vcopd.read_config(options(base, out, "--method", "sft"))
    monkeypatch.setattr(vcopd, "nll_loss", bad)
    assert vcopd.main(cfg, False) == 2
    message = one_error(capsys)
    examples = vcopd.examples_at(tasks.TASKS["arithmetic"](), 3, cfg)
    assert "step 4" in message and all(example.id in message for example in examples)
    assert vcopd.newest_checkpoint(out / "checkpoint")["step"] == saved
    monkeypatch.setattr(vcopd, "nll_loss", nll_loss)
    assert run(["--resume", str(out)]) == 0
    assert results(out) == results(whole["sft"])


def test_kl_far_over_budget_and_tied_groups_are_told_after_patience():
    """One bad step is noise; twenty in a row are a wasted night."""
    cfg, good = vcopd.Config(), {"kl": 0.01, "tied_rollouts": 0.5}
    strayed, tied = {"kl": 0.16, "tied_rollouts": 0.5}, {"kl": 0.01, "tied_rollouts": 1.0}
    count = vcopd.PATIENCE
    assert vcopd.warnings_of([strayed, tied] * (count // 2), cfg) == set()
    assert vcopd.warnings_of([tied] * (count - 1), cfg) == set()
    assert vcopd.warnings_of([good, *[tied] * (count - 1)], cfg) == set()
    [warning] = vcopd.warnings_of([strayed] * count, cfg)
    assert "KL" in warning and "--lr" in warning
    [warning] = vcopd.warnings_of([tied] * count, cfg)
    assert "too easy or too hard" in warning
    assert vcopd.warnings_of([tied] * count, replace(cfg, method="opd")) == set()
    assert vcopd.warnings_of([{"nll": 1.0}] * count, replace(cfg, method="sft")) == set()


def test_a_warning_is_given_once(base, small, tmp_path, monkeypatch, capsys):
    """A warning on every line is read by nobody."""
    monkeypatch.setattr(vcopd, "PATIENCE", 2)
    run(options(base, tmp_path / "run", "--kl-budget", "0", "--lr", "0.1"))
    assert capsys.readouterr().out.count("Warning: KL") == 1


@pytest.mark.parametrize("error", [
    MemoryError(), torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
    RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried")])
def test_out_of_memory_names_the_knobs_in_order(error, base, small, tmp_path, monkeypatch, capsys):
    """The first costs nothing but time; the last ones change the experiment."""
    def full(*args):
        raise error

    monkeypatch.setattr(vcopd, "train_step", full)
    assert run(options(base, tmp_path / "run")) == 2
    message = one_error(capsys)
    knobs = ["--micro-tokens", "--prompts", "--max-new-tokens", "--rollouts", "--lora-rank"]
    assert sorted(knobs, key=message.index) == knobs
    monkeypatch.undo()
    cfg, _ = vcopd.read_config(["--resume", str(tmp_path / "run"), "--micro-tokens", "64"])
    assert cfg.micro_tokens == 64


def test_a_defect_is_not_dressed_up_as_a_users_mistake(base, small, tmp_path, monkeypatch):
    """A traceback is the right answer to a bug of ours."""
    monkeypatch.setattr(vcopd, "train_step", None)
    with pytest.raises(TypeError):
        run(options(base, tmp_path / "run"))


def fill_disk(fd: int) -> None:
    """No byte more."""
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("nth", [1, 7, 11, 13, 27, 31])
def test_a_full_disk_stops_with_one_sentence_and_loses_nothing(
        nth, base, whole, small, tmp_path, monkeypatch, capsys):
    """In config, first checkpoint, a line of metrics, a later checkpoint, adapter, report."""
    capsys.readouterr()
    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", FailingSync(nth, fill_disk))
        assert run(options(base, out)) == 2
    assert "disk is full" in one_error(capsys)
    assert not list(out.glob("**/*.new"))
    again = ["--resume", str(out)] if (out / "config.json").exists() else options(base, out)
    assert run(again) == 0
    assert results(out) == results(whole["vcopd"])


# =============================================================================================
# Bad input: one sentence, exit code 2
# =============================================================================================


def edit_row(**changes) -> str:
    """A line of --data, with changes."""
    row = {"id": "a", "buggy": "def f(x):\n    return x", "entry_point": "f",
           "reference": "def f(x):\n    return x + 1", "tests": [{"args": [1], "expected": 2}]}
    return json.dumps({**row, **changes})


def bad_commands(base: Path, folder: Path) -> list[list[str]]:
    """Command lines of which none can work."""
    flags = {vcopd.option(f.name): f.metadata for f in vcopd.fields(vcopd.Config)}
    numbers = [flag for flag, meta in flags.items() if meta["kind"] in (int, float)]
    values = ["nan", "inf", "-inf", "-1", "1e999", "", "x", "1_0_", "0x10", "\u0663x", "9" * 5000]
    lines = [[flag, value] for flag in numbers for value in values]
    lines += [[flag, "no\nsuch"] for flag, meta in flags.items() if meta["choices"]]
    lines += [[flag] for flag, meta in flags.items() if meta["kind"] is not bool]
    lines += [["--stesp", "3"], ["extra"], ["--unsafe-judge", "yes"], ["--resume"],
              ["--method", "rl", "--teacher-coef", "1"], ["--task", "arithmetic", "--data", "x"]]
    (folder / "file").write_text("x")
    lines += [["--resume", str(path)] for path in (folder, folder / "no", folder / "file")]
    return lines


def test_a_bad_command_line_is_one_sentence(base, tmp_path, capsys):
    """Some 200 of them: every number out of range, every choice, every missing value."""
    lines = bad_commands(base, tmp_path)
    assert len(lines) >= 200
    for line in lines:
        with pytest.raises(SystemExit) as stop:
            vcopd.read_config(line)
        assert stop.value.code == 2, line
        assert one_error(capsys), line


def bad_data() -> list[bytes]:
    """Files that hold no problems."""
    good = edit_row().encode()
    texts = [edit_row(**{name: value}) for name in ("id", "buggy", "reference", "entry_point",
                                                    "tests", "instruction")
             for value in (None, 3, [], {}, "", "\0", "\ud800", [[]], True, [{"args": 1}])]
    deep = []
    for _ in range(150):
        deep = [deep]
    texts += [edit_row(tests=[{"args": [deep], "expected": 1}]), "[" * 99999, "null", "3", "[]",
              edit_row(buggy="def f(:"), edit_row(entry_point="g"), edit_row(test_code="x"),
              edit_row(tests=[{"args": [1]}]), edit_row(tests=[{"args": [1], "expected": 1e999}])
              .replace("Infinity", "NaN"), f"{edit_row()}\n{edit_row()}", '{"id": 1' + "0" * 5000]
    return [b"", b"\n\n", b"\xff\xfe", good[:-1], good + b"\n" + good[:40], good + b"x", b"\0" * 99,
            b"PK\x03\x04", *(text.encode() for text in texts)]


def test_a_bad_data_file_is_one_sentence(base, tmp_path, capsys):
    """With file and line; before any model is loaded, let alone trained."""
    path = tmp_path / "data.jsonl"
    files = bad_data()
    for data in files:
        path.write_bytes(data)
        with pytest.raises(tasks.LoadError) as error:
            tasks.load_edits(str(path))
        assert str(path) in str(error.value) and "\n" not in str(error.value), data[:200]
    assert len(files) >= 60
    assert run(["--data", str(path), "--model", str(base), "--out", str(tmp_path / "o")]) == 2
    assert str(path) in one_error(capsys)


def test_a_file_in_place_of_a_folder_and_a_folder_in_place_of_a_file(
        base, small, tmp_path, capsys):
    """Permissions would do the same, but root has them all."""
    (tmp_path / "file").write_text("x")
    (tmp_path / "run/metrics.jsonl").mkdir(parents=True)
    (tmp_path / "saved/checkpoint").mkdir(parents=True)
    for more in (["--out", str(tmp_path / "file")], ["--out", str(tmp_path / "file/run")],
                 ["--out", str(tmp_path / "run")], ["--out", str(tmp_path / "saved")],
                 ["--task", "codeedit", "--data", str(tmp_path)],
                 ["--task", "codeedit", "--eval-data", str(tmp_path / "none")],
                 ["--benchmark", str(tmp_path / "file")]):
        assert run(options(base, tmp_path / "new", *more)) == 2
        message = one_error(capsys)
        assert str(tmp_path) in message and "Errno" not in message.replace("[Errno 2", "")


def damaged_bases(base: Path, folder: Path) -> list[Path]:
    """Copies of the model folder: each lacks one file, or has it cut, emptied or of another kind"""
    copies = []
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        data = (base / name).read_bytes()
        for damage in (None, b"", b"[]", b"\xff" * 99, data[:len(data) // 2]):
            copies.append(folder / f"base{len(copies)}")
            copies[-1].mkdir()
            for path in base.iterdir():
                (copies[-1] / path.name).write_bytes(path.read_bytes())
            if damage is None:
                (copies[-1] / name).unlink()
            else:
                (copies[-1] / name).write_bytes(damage)
    return copies


def test_a_damaged_model_folder_is_one_sentence(base, small, tmp_path, capsys):
    """The libraries raise a dozen kinds of error at them."""
    wrong = [*damaged_bases(base, tmp_path), tmp_path / "none", tmp_path]
    for folder in wrong:
        assert run(options(folder, tmp_path / "out")) == 2, folder
        assert str(folder) in one_error(capsys)


def test_a_damaged_run_folder_is_one_sentence(done, capsys):
    """Config, metrics and checkpoints: cut, empty, of another kind, of another run."""
    out = done
    (out / "report.json").unlink()
    config = json.loads((out / "config.json").read_text("utf-8"))
    configs = [b"", b"{}", b"[]", b"nul", b"\xff", b"[" * 99999, json.dumps(config)[:-9].encode()]
    for name, value in asdict(vcopd.Config()).items():
        bad = {"steps": "4"}.get(name, [] if isinstance(value, str) else "x")
        configs.append(json.dumps({**config, name: bad}).encode())
        configs.append(json.dumps({k: v for k, v in config.items() if k != name}).encode())
    configs += [json.dumps({**config, "lr": math.nan}).encode()]
    damages = [("config.json", data) for data in configs]
    damages += [("metrics.jsonl", data) for data in (b"", b"{}\n", b"\xff\n", b"[" * 99999 + b"\n")]
    damages += [("checkpoint/00000006.pt", wrapped({})), ("checkpoint/00000006.pt", wrapped([]))]
    for name, data in damages:
        kept = (out / name).read_bytes()
        (out / name).write_bytes(data)
        assert run(["--resume", str(out)]) == 2, (name, data[:200])
        assert str(out) in one_error(capsys)
        (out / name).write_bytes(kept)
    assert run(["--resume", str(out)]) == 0  # all of it could be mended


def wrapped(value) -> bytes:
    """A checkpoint file of something else, with the right checksum."""
    buffer = vcopd.io.BytesIO()
    torch.save(value, buffer)
    return vcopd.hashlib.sha256(buffer.getvalue()).digest() + buffer.getvalue()


def test_a_checkpoint_of_another_model_is_refused(done, capsys):
    """Adapters of the same names and other sizes must not be loaded in part."""
    (done / "report.json").unlink()
    config = json.loads((done / "config.json").read_text("utf-8"))
    (done / "config.json").write_text(json.dumps({**config, "lora_rank": 3}))
    assert run(["--resume", str(done)]) == 2
    assert "another model" in one_error(capsys)


def test_random_bytes_in_any_input_never_end_in_a_traceback(base, small, tmp_path, capsys):
    """200 mutations of good files and commands: each is used as it is, or refused in a line."""
    rng, out = random.Random(0), tmp_path / "run"
    good = "\n".join(edit_row(id=str(i)) for i in range(3)).encode()
    config = json.dumps(asdict(vcopd.Config())).encode()
    out.mkdir()
    for _ in range(200):
        data = bytearray(rng.choice([good, config]))
        for _ in range(rng.randint(1, 4)):
            at = rng.randrange(len(data))
            data[at:at + rng.choice([0, 1, 30])] = rng.choice(
                [b"", b"\0", b'"', b"}", b"[[", b"1e9", b"\xff", b"null", rng.randbytes(3)])
        (out / "config.json").write_bytes(data)
        with contextlib.suppress(SystemExit):
            vcopd.read_config(["--resume", str(out)])
        with contextlib.suppress(tasks.LoadError):
            tasks.load_edits(str(out / "config.json"))
        assert len(capsys.readouterr().err.splitlines()) <= 1


@pytest.mark.parametrize("arguments", [["--lr", "nan"], ["--resume", "/no/such/run"]])
def test_usage_errors_answer_at_once_in_a_real_process(arguments):
    """Before the imports that take seconds."""
    started = time.perf_counter()
    done = subprocess.run([sys.executable, HERE / "vcopd.py", *arguments], capture_output=True,
                          text=True, timeout=30)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert time.perf_counter() - started < 3  # a second where nothing else runs


# =============================================================================================
# Several processes
# =============================================================================================


def as_rank(number: int, count: int, meeting: Path, function, *args) -> int:
    """Play one rank of a gloo group, in a child."""
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=number,
                            world_size=count)
    function(*args)
    return 0


def on_two_ranks(meeting: Path, function, *args) -> None:
    """Run it on two ranks, each in its own process."""
    first = os.fork()
    if first == 0:
        status = in_child(as_rank, 0, 2, meeting, function, *args)
        os._exit(status != 0)
    assert in_child(as_rank, 1, 2, meeting, function, *args) == 0
    assert os.waitpid(first, 0)[1] == 0


def rollouts_of(policy: vcopd.Policy, cfg: vcopd.Config) -> tuple[vcopd.Batch, torch.Tensor]:
    """The rollouts of a whole step, and made-up advantages."""
    prompts = [policy.encode(f"Work out {i} + {i}.") for i in range(cfg.prompts)]
    batch = vcopd.sample(policy, policy.student, prompts, cfg.rollouts, cfg, vcopd.seeded("t"))
    return batch, torch.linspace(-1, 1, len(batch.contexts))


def one_update(cfg: vcopd.Config, out: Path) -> None:
    """Two epochs on this rank's share of the prompts, with replay; rank 0 saves what came out."""
    policy = vcopd.load_policy(cfg, tasks.arithmetic())
    batch, advantage = rollouts_of(policy, cfg)
    optimizer = torch.optim.SGD(vcopd.adapter_parameters(policy.model, "policy"), lr=1.0)
    state = vcopd.State(optimizer, 0.5, replay=batch)
    rows = vcopd.mine(torch.arange(len(batch.contexts)).view(-1, cfg.rollouts)).flatten()
    parts = vcopd.ask_reference(policy, batch.rows(rows), advantage[rows], cfg)
    for epoch in range(2):
        replay = vcopd.draw_replay(state, len(rows), epoch, cfg)
        info = vcopd.update(policy, parts, replay, state, cfg)
    weights = {n: p.detach() for n, p in vcopd.named_adapters(policy.model).items()}
    torch.save((weights, info), out / f"{vcopd.world()}-{vcopd.rank()}.pt")


def test_two_ranks_make_the_update_of_one_process(base, tmp_path):
    """2 ranks x 3 prompts and 1 rank x 6 prompts, on the same rollouts of unequal lengths: the
    token count that divides, the gradient, the clipping norm and all that is logged must agree.
    """
    cfg, _ = vcopd.read_config(options(base, tmp_path, "--prompts", "6", "--max-new-tokens", "12",
                                       "--replay-share", "0.3", "--micro-tokens", "60"))
    one_update(cfg, tmp_path)
    on_two_ranks(tmp_path / "meeting", one_update, cfg, tmp_path)
    weights, info = torch.load(tmp_path / "1-0.pt")
    assert sum(weight.abs().sum() for weight in weights.values()) > 0
    for number in range(2):
        weights_rank, info_rank = torch.load(tmp_path / f"2-{number}.pt")
        torch.testing.assert_close(weights_rank, weights, atol=1e-6, rtol=1e-5)
        assert info_rank == pytest.approx(info, rel=1e-4, abs=1e-6)


def whole_run(arguments: list[str], out: Path) -> None:
    """A run as one rank; what must be the same everywhere is kept."""
    cfg, resuming = vcopd.read_config(arguments)
    loaded, load_policy = [], vcopd.load_policy
    vcopd.load_policy = lambda *args: loaded.append(load_policy(*args)) or loaded[-1]
    vcopd.run(cfg, Path(cfg.out), resuming)
    weights = {n: p.detach() for n, p in vcopd.named_adapters(loaded[0].model).items()}
    torch.save(weights, out / f"weights-{vcopd.rank()}.pt")


@pytest.mark.parametrize("method", ["vcopd", "sft"])
def test_a_run_on_two_ranks_writes_once_keeps_equal_weights_and_resumes(
        method, base, small, tmp_path):
    """With Step 1, replay and evaluation; every step's reward is that of all the rollouts."""
    out = tmp_path / "run"
    out.mkdir()
    more = ["--method", method, "--format-threshold", "1", "--format-examples", "5"]
    on_two_ranks(tmp_path / "meet", whole_run, options(base, out, *more), tmp_path)
    weights = [torch.load(tmp_path / f"weights-{number}.pt") for number in range(2)]
    assert all(torch.equal(weight, weights[1][name]) for name, weight in weights[0].items())
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert method == "sft" or all(line["reward"] in (-1, -0.5, 0, 0.5, 1) for line in lines)
    kept = results(out)
    (out / "report.json").unlink()
    (out / "checkpoint/00000006.pt").unlink()
    on_two_ranks(tmp_path / "meet again", whole_run, ["--resume", str(out)], tmp_path)
    assert results(out) == kept


@pytest.mark.parametrize(("more", "said"), [
    (["--prompts", "3"], "cannot be shared by 2 processes"),
    (["--device", "cuda:1"], "give cuda or cpu")])
def test_what_two_processes_cannot_share_is_told_before_they_meet(
        more, said, base, tmp_path, monkeypatch, capsys):
    """Unequal shares would weigh some prompts more; one device cannot be two."""
    for name, value in {"TORCHELASTIC_RUN_ID": "x", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    assert run(options(base, tmp_path / "run", *more)) == 2
    assert said in one_error(capsys)


def test_torchrun_meets_and_speaks_with_one_voice(base, tmp_path):
    """The real launcher; what is printed and written is rank 0's."""
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2",
         HERE / "vcopd.py", *options(base, tmp_path / "run", "--steps", "1")],
        capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Verdict:") == 1
    assert (tmp_path / "run/metrics.jsonl").read_text("utf-8").count("\n") == 1
