"""The command line: exit codes, messages of one line, and what is left on disk."""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch

from seme import cli
from seme.engine import Progress

from .checkpoints import CONFIG, decoder, read, write

RECIPE = """\
merge_method: task_arithmetic
base_model: base
models:
  - model: a
    parameters: {weight: [0.25, 0.75]}
"""


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate(("base", "a", "b")):
        write(tmp_path / name, decoder(seed))
    (tmp_path / "recipe.yml").write_text(RECIPE)
    return tmp_path


def seme(capsys, *arguments):
    code = cli.main(arguments)
    return code, *capsys.readouterr()


def untouched(here, before):
    """Nothing new, not even hidden."""
    return sorted(os.listdir(here)) == before


def test_merge(capsys, here):
    code, out, err = seme(capsys, "merge", "recipe.yml", "out")
    assert (code, err) == (0, "")
    assert out.startswith("out: 30 tensors, ")
    assert "/s read and written" in out
    assert "peak memory" in out
    assert len(read(here / "out")) == 30


def test_quiet_and_json(capsys):
    assert seme(capsys, "merge", "recipe.yml", "one", "--quiet") == (0, "", "")
    code, out, err = seme(capsys, "merge", "recipe.yml", "two", "--json")
    assert (code, err) == (0, "")
    found = json.loads(out)
    assert (found["path"], found["tensors"], found["backend"]) == ("two", 30, "cpu")
    assert found["bytes_read"] > found["bytes_written"] > 0
    assert found["peak_rss_bytes"] > 0


def test_dry_run_writes_nothing_and_says_everything(capsys, here):
    before = sorted(os.listdir(here))
    code, out, _ = seme(capsys, "merge", "recipe.yml", "out", "--dry-run", "--verbose")
    assert code == 0
    assert untouched(here, before)
    for part in ("task_arithmetic", "30 with", "read ", "write ", "memory ", "model.safetensors"):
        assert part in out
    assert "model.layers.1.mlp.up_proj.weight [12, 8] float32->float32 weight=[0.5]" in out
    assert "model.norm.weight [8] float32->float32 weight=[0.25]" in out
    code, out, _ = seme(capsys, "merge", "recipe.yml", "out", "--dry-run", "--json")
    plan = json.loads(out)
    assert plan["tensors"] == 30
    assert plan["peak_memory_bytes"] > plan["buffer_bytes"] > 0
    assert sum(plan["shards"].values()) == plan["bytes_written"]
    assert "per_tensor" not in plan


def edit(**changes):
    def apply(here):
        text = RECIPE
        for old, new in changes.items():
            text = text.replace(old, new)
        (here / "recipe.yml").write_text(text)

    return apply


def nan(here):
    tensors = decoder(1)
    tensors["model.norm.weight"][:2] = float("nan")
    write(here / "a", tensors)


def reshape(here):
    tensors = decoder(1)
    tensors["model.norm.weight"] = torch.ones(9)
    write(here / "a", tensors)


MISTAKES = {
    "unknown method": (
        edit(task_arithmetic="task_arithmetik"),
        (),
        "merge_method: unknown method 'task_arithmetik'; did you mean",
    ),
    "unknown key": (edit(base_model="base_modle"), (), "base_modle: unknown key; did you mean 'base_model'?"),
    "unknown parameter": (
        edit(weight="wieght"),
        (),
        "models[0].parameters.wieght: task_arithmetic has no such parameter; did you mean 'weight'",
    ),
    "missing weight": (edit(**{"    parameters: {weight: [0.25, 0.75]}\n": ""}), (), "weight: missing; "),
    "missing model": (edit(**{"model: a": "model: ./nowhere"}), (), "./nowhere: no such"),
    "no recipe": (lambda here: (here / "recipe.yml").unlink(), (), "recipe.yml: recipe cannot be read"),
    "shape": (reshape, (), "tensor model.norm.weight has shape [9], [8] in base/model.safetensors"),
    "nan": (
        nan,
        (),
        "a/model.safetensors: tensor model.norm.weight: 2 of 8 elements are inf or NaN; repair the model, or pass",
    ),
    "truncated": (
        lambda here: os.truncate(here / "a" / "model.safetensors", 3000),
        (),
        "a/model.safetensors: 3000 bytes, the header describes",
    ),
    "bad memory": (edit(), ("--memory", "lots"), "memory: 'lots' is not a size"),
    "too little memory": (edit(), ("--memory", "1kB"), "memory: 1000 bytes are too few"),
    "NaN in a matrix method": (
        edit(task_arithmetic="iso_c"),
        ("--nonfinite", "keep"),
        "nonfinite: keep: iso_c would spread a NaN over whole matrices; use zero",
    ),
    "bad threads": (edit(), ("--threads", "0"), "threads: 0; expected a whole number, at least 1"),
    "verbose without a plan": (edit(), ("--verbose",), "--verbose: shows every tensor of the plan; add --dry-run"),
    "no gpu": (edit(), ("--device", "cuda"), "no CUDA device"),
    "bad device": (edit(), ("--device", "tpu"), "device tpu: expected auto, cpu, cuda or cuda:N"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_exit_2_with_one_line_and_write_nothing(mistake, capsys, here, *more):
    prepare, options, message = MISTAKES[mistake]
    if mistake == "no gpu" and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    prepare(here)
    before = sorted(os.listdir(here))
    code, out, err = seme(capsys, "merge", "recipe.yml", "out", *options, *more)
    assert code == 2
    assert out == ""
    assert err.count("\n") == 1
    assert err.startswith("seme: error: ")
    assert message in err
    assert untouched(here, before)


@pytest.mark.parametrize("mistake", [m for m in MISTAKES if m not in ("nan", "verbose without a plan")])
def test_mistakes_show_in_the_dry_run(mistake, capsys, here):
    """All but what only the data tell."""
    test_mistakes_exit_2_with_one_line_and_write_nothing(mistake, capsys, here, "--dry-run")


@pytest.mark.parametrize("option", ["--dry-run", "--quiet", "--json"])
def test_mistakes_with_other_options(option, capsys, here):
    nan(here)
    reshape(here)
    before = sorted(os.listdir(here))
    code, out, err = seme(capsys, "merge", "recipe.yml", "out", option)
    assert code == 2
    assert err.startswith("seme: error: ")
    assert err.count("\n") == 1
    if option == "--json":
        assert json.loads(out) == {"error": err.removeprefix("seme: error: ").strip(), "exit_code": 2}
    else:
        assert out == ""
    assert untouched(here, before)


def test_notes_are_printed_and_planned(capsys, here):
    tensors = decoder(1)
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    write(here / "a", tensors)
    note = "model.layers.0.self_attn.rotary_emb.inv_freq of a: left out, transformers computes it"
    assert f"note      {note}\n" in seme(capsys, "merge", "recipe.yml", "out", "--dry-run")[1]
    assert note in json.loads(seme(capsys, "merge", "recipe.yml", "out", "--dry-run", "--json")[1])["notes"]
    assert seme(capsys, "merge", "recipe.yml", "out")[1].startswith(f"note: {note}\n")
    assert json.loads(seme(capsys, "merge", "recipe.yml", "two", "--json")[1])["notes"] == [note]


def test_options_reach_the_merge(capsys, here):
    nan(here)
    options = ("--nonfinite", "zero", "--out-shard-size", "3kB", "--threads", "1", "--memory", "4MiB")
    assert seme(capsys, "merge", "recipe.yml", "out", *options, "-q") == (0, "", "")
    found = read(here / "out")
    assert len(list((here / "out").glob("*.safetensors"))) == 3
    assert torch.isfinite(found["model.norm.weight"]).all()
    shards = json.loads(seme(capsys, "merge", "recipe.yml", "two", *options, "--dry-run", "--json")[1])["shards"]
    assert len(shards) == 3


def test_target_with_something_in_it(capsys, here):
    (here / "out").mkdir()
    (here / "out" / "precious").write_text("x")
    code, _, err = seme(capsys, "merge", "recipe.yml", "out")
    assert code == 2
    assert "out: not empty; choose another folder or pass --overwrite" in err
    code, _, err = seme(capsys, "merge", "recipe.yml", "out", "--overwrite")
    assert code == 2
    assert "out: not a model" in err
    assert os.listdir(here / "out") == ["precious"]
    (here / "out" / "config.json").touch()
    assert seme(capsys, "merge", "recipe.yml", "out", "--overwrite", "-q")[0] == 0
    assert not (here / "out" / "precious").exists()


@pytest.mark.parametrize("recipe", ["out/recipe.yml", "../{}/out/recipe.yml"])
def test_target_with_the_recipe_in_it(recipe, capsys, here):
    write(here / "out", decoder(3))
    (here / "recipe.yml").rename(here / "out" / "recipe.yml")
    recipe = recipe.format(here.name)
    code, _, err = seme(capsys, "merge", recipe, "out", "--overwrite")
    assert code == 2
    assert f"out: holds the recipe {recipe}; choose another output folder" in err
    assert len(read(here / "out")) == 30


def test_json_errors_and_debug(capsys):
    code, out, _ = seme(capsys, "merge", "nowhere.yml", "out", "--json")
    assert code == 2
    assert json.loads(out)["exit_code"] == 2
    with pytest.raises(Exception, match="nowhere"):
        cli.main(["merge", "nowhere.yml", "out", "--debug"])


def test_faults_exit_1(capsys, monkeypatch):
    monkeypatch.setattr("seme.plan.make", lambda *a: 1 / 0)
    code, _, err = seme(capsys, "merge", "recipe.yml", "out")
    assert code == 1
    assert "ZeroDivisionError" in err
    assert err.count("\n") == 1


def test_wrong_usage_exits_2(capsys):
    with pytest.raises(SystemExit) as e:
        cli.main(["merge", "recipe.yml"])
    assert e.value.code == 2


def test_methods(capsys):
    from seme.methods import methods

    code, out, _ = seme(capsys, "methods")
    assert code == 0
    listed = [line.split()[0] for line in out.splitlines()]
    assert listed == sorted(methods())
    _, out, _ = seme(capsys, "methods", "ties")
    assert "density (float, per model, not the base, default 1.0)" in out
    assert json.loads(seme(capsys, "methods", "ties", "--json")[1])["parameters"][0]["name"] == "weight"
    assert seme(capsys, "methods", "tis")[0] == 2


@pytest.fixture
def cache(here, monkeypatch):
    monkeypatch.setenv("SEME_CACHE", str(here / "cache"))
    return here / "cache" / "bases"


def test_bases(capsys, cache):
    code, out, err = seme(capsys, "bases", "a")
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert [line.split()[0] for line in lines[:7]] == ["model", "head", "bases", "rank", "condition", "norms", "time"]
    for part in (
        "lm_head.weight times model.norm.weight",
        "17 labels in 8 dimensions, v/d = 2.1",
        "8 of 8 (Cholesky)",
        f"(cache: {cache}",
    ):
        assert part in out
    assert [line.rsplit(maxsplit=2)[0].strip() for line in lines[9:]] == [
        "random directions",
        "rows of the head",
        "rows of the embedding",
        *(f"written by model.layers.{i}" for i in range(3)),
    ]
    assert all(0 < float(least) <= float(mean) <= 1 for *_, mean, least in map(str.split, lines[9:]))
    assert f"(found in {cache}" in seme(capsys, "bases", "a")[1]


def test_bases_as_json(capsys, here, cache):
    tensors = decoder(1)
    tensors["lm_head.weight"][[3, 9]] = 0
    write(here / "a", tensors)
    first = json.loads(seme(capsys, "bases", "a", "--json")[1])
    assert (first["source"], first["rank"], first["labels"], first["width"]) == ("computed", 8, 17, 8)
    assert first["zero_labels"] == {"count": 2, "first": ["<3>", "<9>"]}
    assert first["seconds"].keys() == {"bases", "frame"}
    assert first["condition"] >= 1
    plain = json.loads(seme(capsys, "bases", "a", "--json", "--no-fold-norm")[1])
    assert (plain["source"], plain["gain_folded"], first["gain_folded"]) == ("computed", None, "model.norm.weight")
    assert plain["round_trip"] != first["round_trip"]
    again = json.loads(seme(capsys, "bases", "a", "--json")[1])
    assert again["source"] == "cache"
    assert {k: v for k, v in again.items() if k not in ("source", "seconds")} == {
        k: v for k, v in first.items() if k not in ("source", "seconds")
    }


def test_bases_of_what_is_no_model(capsys, here, cache):
    lone = {name: x for name, x in decoder(1).items() if "embed" not in name and "lm_head" not in name}
    write(here / "b", lone)
    for model, options, message in (
        ("./nowhere", (), "./nowhere: no such file or folder"),
        ("cache", (), "cache: no model.safetensors"),
        ("b", (), "b: no LM head or embedding with rows of hidden_size 8"),
        ("a", ("--device", "tpu"), "device tpu: expected cpu, cuda or cuda:N"),
    ):
        (here / "cache").mkdir(exist_ok=True)
        code, out, err = seme(capsys, "bases", model, *options)
        assert (code, out, err.count("\n")) == (2, "", 1)
        assert err.startswith("seme: error: ")
        assert message in err


@pytest.fixture
def handlers():
    """What a signal does is as before; the command line leaves the process deaf when it was stopped."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.getsignal(number) for number in numbers}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """A model that takes a second to merge."""
    return write(tmp_path_factory.mktemp("large"), {"w": torch.zeros(150_000_000, dtype=torch.bfloat16)}, CONFIG)


@pytest.mark.parametrize(
    ("number", "times", "message"),
    [
        (signal.SIGINT, 1, "interrupted; nothing was written"),
        (signal.SIGINT, 50, "interrupted; nothing was written"),
        (signal.SIGTERM, 1, "interrupted by SIGTERM; nothing was written"),
        (signal.SIGHUP, 1, "interrupted by SIGHUP; nothing was written"),
    ],
)
def test_signals_leave_nothing(number, times, message, here, large):
    """To a real process in the middle of a merge; a key held down sends many."""
    for name in ("base", "a"):
        shutil.rmtree(here / name)
        (here / name).symlink_to(large)
    before = sorted(os.listdir(here))
    child = subprocess.Popen(
        [sys.executable, "-m", "seme", "merge", "recipe.yml", "new/folder/out", "--threads", "1"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=child_environment(),
        # A shell's background jobs ignore SIGINT, and so would the child of one.
        preexec_fn=lambda: signal.signal(number, signal.SIG_DFL),
    )
    staging = here / "new" / "folder" / ".out.seme-staging"
    deadline = time.monotonic() + 60
    while not staging.exists() and child.poll() is None and time.monotonic() < deadline:
        time.sleep(0.001)
    assert staging.exists(), "the merge was over before it could be interrupted"
    for _ in range(times):
        child.send_signal(number)
        time.sleep(0.001)
    _, err = child.communicate(timeout=60)
    assert (child.returncode, err) == (128 + number, f"seme: error: {message}\n")
    assert untouched(here, before)


def test_a_signal_before_there_are_arguments(capsys, monkeypatch, handlers):
    monkeypatch.setattr(cli, "_parser", lambda: signal.raise_signal(signal.SIGINT))
    assert seme(capsys, "env") == (130, "", "seme: error: interrupted\n")
    assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN


def test_signals_that_are_ignored_stay_so_and_others_are_given_back(capsys, monkeypatch, handlers):
    """As nohup and the background jobs of a shell ask for."""
    seen = []

    def env(_):
        seen.extend(signal.getsignal(n) for n in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM))
        return 0

    monkeypatch.setattr(cli, "_env", env)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # whoever runs the tests may have handlers of his own
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    assert seme(capsys, "env")[0] == 0
    assert seen[0] == signal.SIG_IGN
    assert callable(seen[1])
    assert seen[1] is seen[2]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_in_another_thread(capsys):
    codes = []
    thread = threading.Thread(target=lambda: codes.append(cli.main(["merge", "recipe.yml", "out", "-q"])))
    thread.start()
    thread.join()
    assert codes == [0]


@pytest.mark.parametrize("when", ["removing", "printing"])
@pytest.mark.parametrize("how", ["signal", "exception"])
def test_an_interrupt_that_comes_too_late_says_so(how, when, capsys, here, monkeypatch, handlers):
    write(here / "out", decoder(5))

    def interrupt(*_, **__):
        if how == "exception":
            raise KeyboardInterrupt
        signal.raise_signal(signal.SIGINT)

    if when == "removing":
        monkeypatch.setattr(shutil, "rmtree", interrupt)
    else:
        monkeypatch.setattr(cli, "_peak_memory", interrupt)
    code, out, err = seme(capsys, "merge", "recipe.yml", "out", "--overwrite")
    assert (code, out, err) == (130, "", "seme: error: interrupted; the merge was complete\n")
    assert (here / "out" / "seme_config.yml").exists()


@pytest.mark.parametrize("shards", ["inputs", "output", "both"])
def test_more_shards_than_open_files(shards, here):
    """Here 24 files may be open, and there are 30 shards of each."""
    for seed, name in enumerate(("base", "a")):
        if shards != "output":
            (here / name / "model.safetensors").unlink()
            write(here / name, decoder(seed), layout="30 shards")
    done = subprocess.run(
        [sys.executable, "-m", "seme", "merge", "recipe.yml", "out", "--threads", "2", "--json"]
        + ([] if shards == "inputs" else ["--out-shard-size", "1"]),
        capture_output=True,
        text=True,
        env=child_environment(),
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (24, 24)),
    )
    assert done.returncode == 0, done.stderr
    assert len(list((here / "out").glob("*.safetensors"))) == (1 if shards == "inputs" else 30)
    assert len(read(here / "out")) == 30


def child_environment():
    root = os.path.dirname(os.path.dirname(os.path.abspath(cli.__file__)))
    return {**os.environ, "PYTHONPATH": root}


def test_help_is_quick():
    """Without numpy and torch it takes a tenth of a second; with either, several."""
    spent = []
    for _ in range(3):
        before = os.times()
        done = subprocess.run(
            [sys.executable, "-m", "seme", "--help"], capture_output=True, text=True, env=child_environment()
        )
        after = os.times()
        spent.append(after.children_user + after.children_system - before.children_user - before.children_system)
        assert done.returncode == 0
        assert "merge models as a mergekit-style YAML recipe says" in done.stdout
    assert min(spent) < 0.5, "CPU seconds"


@pytest.mark.parametrize("layout", ["single", "bin"])
def test_the_peak_that_the_dry_run_tells(layout, here):
    """torch takes most of it for a ``.bin`` file, and maps the file."""
    for name in ("base", "a"):
        shutil.rmtree(here / name)
        write(here / name, {"w": torch.ones(20_000_000)}, CONFIG, layout=layout)
    told, found = (
        json.loads(
            subprocess.run(
                [sys.executable, "-m", "seme", "merge", "recipe.yml", "out", "--threads", "1", "--json", *more],
                capture_output=True,
                text=True,
                env=child_environment(),
                check=True,
            ).stdout
        )
        for more in (["--dry-run"], [])
    )
    assert 0.4 < found["peak_rss_bytes"] / told["peak_memory_bytes"] < 2.5


def test_memory_does_not_depend_on_the_model(here):
    """Two inputs of 100 MB each: the peak is that of the interpreter and the buffers."""
    recipe = RECIPE.replace("task_arithmetic", "ties").replace("0.75]}", "0.75], density: 0.3}")
    (here / "recipe.yml").write_text(recipe)
    peaks = {}
    for numel in (10_000, 50_000_000):
        for seed, name in enumerate(("base", "a")):
            x = torch.arange(numel, dtype=torch.float32) % (1000 + seed) / 1000
            write(here / name, {"w": x.to(torch.bfloat16)}, CONFIG)
        done = subprocess.run(
            [sys.executable, "-m", "seme", "merge", "recipe.yml", f"out{numel}", "--json", "--memory", "16MiB"],
            capture_output=True,
            text=True,
            env=child_environment(),
        )
        assert done.returncode == 0, done.stderr
        peaks[numel] = json.loads(done.stdout)["peak_rss_bytes"]
    # 16 MiB of buffers that the small model does not fill, and histograms of half a megabyte per worker.
    assert peaks[50_000_000] < peaks[10_000] + 25_000_000 < 100_000_000


class TestDisplay:
    def progress(self, **changes):
        return Progress(**{"total": 2000, "done": 500, "read": 1000, "started": time.monotonic() - 20, **changes})

    def test_lines_where_there_is_no_terminal(self, capsys):
        display = cli._Display(quiet=False)
        display.update(self.progress())
        assert capsys.readouterr().err == "", "not more often than every ten seconds"
        display._said -= 11
        display.update(self.progress())
        line = capsys.readouterr().err
        assert line.startswith(" 25%  500 B of 2.0 kB written, ")
        assert line.endswith(", 60 s left\n")

    def test_before_the_first_byte(self, capsys):
        display = cli._Display(quiet=False)
        display._said -= 11
        display.update(self.progress(done=0, total=0))
        assert capsys.readouterr().err.startswith("  0%  0 B of 0 B written")

    def test_quiet(self, capsys):
        display = cli._Display(quiet=True)
        display._said -= 11
        display.update(self.progress())
        assert capsys.readouterr().err == ""

    def test_a_bar_on_a_terminal(self, capsys):
        with cli._Display(quiet=False) as display:
            display.terminal = True
            display.update(self.progress(started=time.monotonic()))
            assert display._bar is None, "not for a merge that is over in a moment"
            display.update(self.progress())
            (task,) = display._bar.tasks
            assert (task.completed, task.total) == (500, 2000)
            assert "/s" in task.fields["rate"]
        assert display._bar.finished or not display._bar.live.is_started


def test_help_and_merge_import_nothing_heavy(here):
    program = (
        "import sys; from seme.cli import main\n"
        "try: main(sys.argv[1:])\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'numpy', 'transformers', 'triton', 'huggingface_hub', 'rich'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    for arguments in (["--help"], ["merge", "recipe.yml", "out", "-q"], ["methods"]):
        done = subprocess.run(
            [sys.executable, "-c", program, *arguments], capture_output=True, text=True, env=child_environment()
        )
        assert done.returncode == 0, done.stderr
