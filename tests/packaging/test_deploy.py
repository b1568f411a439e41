"""deploy/: the files that compose, Prometheus and Grafana read; and, slow, what is started by them.

Leaves out the images: building them takes docker (docs/load.md has the run).
"""

import json
import os
import random
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from itertools import chain
from pathlib import Path
from types import ModuleType

import httpx
import pytest
import yaml

from era_vllm.errors import EraError
from era_vllm.lab import CHECKPOINT
from era_vllm.lab.servers import Server, free_port, wait_for
from era_vllm_server import front
from era_vllm_server.settings import NOT_OURS, ServerSettings

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
COMPOSE = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
ALERTS = yaml.safe_load((DEPLOY / "prometheus" / "alerts.yml").read_text())
METRIC = re.compile(
    r"\b(?:vllm|era):\w+|\bhttp_\w+"
)  # http_ are vLLM's, to whom our front is not known
SUFFIXES = ("", "_total", "_bucket", "_sum", "_count")


def program(name: str) -> str:
    """Return where a program is; skip without it."""
    found = shutil.which(name)
    if found is None:
        pytest.skip(f"{name} is not installed (Debian: apt-get install {name})")
    return found


def load(path: Path) -> ModuleType:
    """Import a script of deploy/."""
    spec = spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


QUERIES = load(DEPLOY / "grafana" / "queries.py")
CLIP = load(DEPLOY / "loadtest" / "clip.py")
CHAT = "{% for m in messages %}USER: {{ m['content'] }} {% endfor %}ASSISTANT:"


def run(*command: object, timeout: float = 60, env: dict[str, str] | None = None) -> str:
    """Run a command at the repository root; fail with all that it said."""
    words = list(map(str, command))
    done = subprocess.run(words, capture_output=True, text=True, cwd=ROOT, timeout=timeout, env=env)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done.stdout


def composed(*files: str, **variables: str) -> dict[str, dict[str, object]]:
    """Return services, as compose reads them from files."""
    options = [word for file in files for word in ("-f", DEPLOY / file)]
    environment = {name: os.environ[name] for name in os.environ if name[:9] != "ERA_MODEL"}
    config = run(program("docker-compose"), *options, "config", env=environment | variables)
    services = yaml.safe_load(config)["services"]
    assert set(services) == {"era-vllm", "prometheus", "grafana"}
    return services


@pytest.mark.parametrize("files", [[], ["compose.cuda.yaml"]], ids=str)
def test_compose_reads_its_files(files: list[str]) -> None:
    composed("compose.yaml", *files)


@pytest.mark.parametrize("files", [[], ["compose.cuda.yaml"]], ids=str)
def test_compose_mounts_a_folder_with_a_model(files: list[str], tmp_path: Path) -> None:
    files = ["compose.yaml", *files, "compose.model.yaml"]
    variables = {"ERA_MODEL": str(tmp_path), "ERA_MODEL_ARGS": "--era-pruning-rate .889"}
    service = composed(*files, **variables)["era-vllm"]
    command = service["command"]
    words = command.split() if isinstance(command, str) else command
    assert words == ["/model", "--served-model-name", "model", "--era-pruning-rate", ".889"]
    mounts = [m for m in service["volumes"] if "/model:" in str(m) or "'/model'" in str(m)]
    assert len(mounts) == 1 and "ro" in str(mounts[0]).replace("read_only", "ro")
    assert service["read_only"] and service["environment"]["HF_HUB_OFFLINE"] == "1"
    with pytest.raises(AssertionError, match="the folder of the model"):
        composed(*files)


@pytest.mark.vllm
def test_an_image_takes_a_model_behind_its_entry_point() -> None:
    """vLLM reads a model only where no flag stands before it."""
    (entry,) = re.findall(r"^ENTRYPOINT (.*)$", (ROOT / "Dockerfile").read_text(), re.M)
    name, *words = json.loads(entry)
    command = [Path(sys.executable).with_name(name), *words, CHECKPOINT, "--print-command"]
    printed = run(*command, timeout=200)  # what `$(era-vllm serve ... | tail -1)` runs
    assert f" vllm serve {CHECKPOINT} " in printed.splitlines()[-1]


def test_a_servers_settings_leave_composes_variables_alone() -> None:
    text = "".join(path.read_text() for path in DEPLOY.glob("compose*.yaml"))
    variables = set(re.findall(r"\$\{(ERA_\w+)", text))
    assert variables == {"ERA_BIND", "ERA_MODEL", "ERA_MODEL_NAME", "ERA_MODEL_ARGS"}
    assert variables <= NOT_OURS


@pytest.mark.parametrize("name", COMPOSE["services"])
def test_services_can_do_little(name: str) -> None:
    service = COMPOSE["services"][name]
    assert service["read_only"] and service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert set(service["secrets"]) <= set(COMPOSE["secrets"])
    assert all(":-127.0.0.1:" in port for port in service["ports"]), "open to the network"
    assert not service.get("image", "").endswith(":latest")
    for mount in service.get("volumes", ()):
        source, _, options = mount.partition(":")
        assert source in COMPOSE["volumes"] or options.endswith(":ro"), mount


def test_the_grace_period_covers_the_drain_and_the_engines_end() -> None:
    """vLLM takes as long as --shutdown-timeout, once we have drained; behind it it kills."""
    drain_s = ServerSettings.model_fields["drain_timeout_s"].default
    needed_s = drain_s + (drain_s + front._MARGIN_S) + 15  # last words, connections, the kill
    assert int(COMPOSE["services"]["era-vllm"]["stop_grace_period"].removesuffix("s")) >= needed_s


def test_paths_that_compose_mounts_exist() -> None:
    mounts = chain.from_iterable(s.get("volumes", ()) for s in COMPOSE["services"].values())
    sources = [mount.split(":")[0] for mount in mounts if mount.startswith(".")]
    assert sources and all((DEPLOY / source).is_dir() for source in sources)


def test_keys_are_made_once(tmp_path: Path) -> None:
    shutil.copy(DEPLOY / "keys.sh", tmp_path)
    (tmp_path / "secrets").mkdir()
    run(tmp_path / "keys.sh")
    files = {Path(secret["file"]).name for secret in COMPOSE["secrets"].values()}
    made = {path.name: path.read_text() for path in (tmp_path / "secrets").iterdir()}
    assert set(made) == files and len(set(made.values())) == len(files)
    assert all(len(key) > 30 for key in made.values())
    run(tmp_path / "keys.sh")
    assert made == {path.name: path.read_text() for path in (tmp_path / "secrets").iterdir()}


def test_no_secret_is_in_git() -> None:
    ignored = (DEPLOY / "secrets" / ".gitignore").read_text().splitlines()
    assert [line for line in ignored if not line.startswith("#")] == ["*", "!.gitignore"]


@pytest.mark.parametrize(
    "words",
    [
        "check config --syntax-only prometheus.yml",
        "check rules alerts.yml",
        "test rules alerts.test.yml",
    ],
)
def test_promtool(words: str) -> None:
    *verbs, file = words.split()
    run(program("promtool"), *verbs, DEPLOY / "prometheus" / file)


def test_prometheus_reads_the_mounted_key() -> None:
    config = yaml.safe_load((DEPLOY / "prometheus" / "prometheus.yml").read_text())
    (job,) = [job for job in config["scrape_configs"] if job["job_name"] == "era-vllm"]
    key = job["authorization"]["credentials_file"]
    assert key == COMPOSE["services"]["era-vllm"]["environment"]["ERA_METRICS_KEY_FILE"]
    assert Path(key).name in COMPOSE["services"]["prometheus"]["secrets"]
    assert job["static_configs"] == [{"targets": ["era-vllm:8000"]}]


@pytest.mark.vllm
def test_queries_name_metrics_that_a_server_has() -> None:
    alerts = [rule["expr"] for group in ALERTS["groups"] for rule in group["rules"]]
    asked = set(METRIC.findall(" ".join([*(query for _, query in QUERIES.queries()), *alerts])))
    known = set(exposed())
    assert asked and asked <= known, asked - known
    ours = {
        name for name in known if name.startswith("era:") and name.endswith(("_total", "_bucket"))
    }
    assert ours <= asked, f"not on the dashboard: {ours - asked}"


def exposed() -> Iterator[str]:
    """Yield the names of a server's metrics, as its sources have them."""
    spec = find_spec("vllm")
    assert spec is not None and spec.origin is not None
    sources = [
        Path(spec.origin).parent / "v1" / "metrics" / "loggers.py",
        ROOT / "server" / "era_vllm_server" / "metrics.py",
    ]
    for source in sources:
        for kind, name in re.findall(
            r'(\w+)\(\s*(?:name=)?"((?:vllm|era):\w+)"', source.read_text()
        ):
            lower = kind.lower()
            if "counter" in lower:
                yield name.removesuffix("_total") + "_total"
            elif "histogram" in lower:
                yield from (name + suffix for suffix in ("_bucket", "_sum", "_count"))
            else:
                yield name


@pytest.fixture(params=["sample", "qwen3-vl"])
def scraped(
    request: pytest.FixtureRequest, tmp_path: Path
) -> Iterator[tuple[str, str, dict[str, str], str]]:
    """A server behind keys and a Prometheus that scrapes it: URLs of both, keys, which model."""
    config = yaml.safe_load((DEPLOY / "prometheus" / "prometheus.yml").read_text())
    keys = {name: f"era-{name}" for name in ("api_key", "metrics_key")}
    for name, key in keys.items():
        (tmp_path / name).write_text(key + "\n")
    settings = {f"ERA_{name.upper()}_FILE": str(tmp_path / name) for name in ("metrics_key",)}
    settings["ERA_API_KEYS_FILE"] = str(tmp_path / "api_key")
    command = [Path(sys.executable).with_name("era-vllm"), "serve"]
    if request.param != "sample":
        command.append(random_qwen(tmp_path / "model"))
    limits = ["--enforce-eager", "--max-model-len", "1024", "--kv-cache-memory-bytes", "64M"]
    limits += ["--dtype", "float32"]
    with Server("scraped", [*map(str, command), *limits], settings, tmp_path / "log") as server:
        job = next(job for job in config["scrape_configs"] if job["job_name"] == "era-vllm")
        job["authorization"]["credentials_file"] = str(tmp_path / "metrics_key")
        job["static_configs"] = [{"targets": [f"127.0.0.1:{server.port}"]}]
        config |= {"scrape_configs": [job], "global": {"scrape_interval": "1s"}}
        config["rule_files"] = [str(DEPLOY / "prometheus" / "alerts.yml")]
        (tmp_path / "prometheus.yml").write_text(yaml.safe_dump(config))
        address = f"127.0.0.1:{free_port()}"
        options = {"config.file": tmp_path / "prometheus.yml", "storage.tsdb.path": tmp_path / "db"}
        options["web.listen-address"] = address
        words = [f"--{name}={value}" for name, value in options.items()]
        wait_for([server])
        with subprocess.Popen([program("prometheus"), *words], stderr=subprocess.DEVNULL) as own:
            yield server.url, f"http://{address}", keys, request.param
            own.terminate()


def random_qwen(folder: Path) -> Path:
    """Write a tiny Qwen3-VL of random weights, which takes videos too."""
    from tests.engine.families.qwen import QWEN3

    QWEN3.save(folder)
    (folder / "chat_template.jinja").write_text(CHAT)
    return folder


@pytest.mark.slow
@pytest.mark.vllm
def test_dashboard_has_data_of_a_server(scraped: tuple[str, str, dict[str, str], str]) -> None:
    url, prometheus, keys, model = scraped
    variables = {name.upper(): key for name, key in keys.items()}
    smoke = [DEPLOY / "smoke.sh", url]
    said = run(*smoke, timeout=300, env={**os.environ, **variables})
    assert "smoke: passed" in said and ("video, strong: " in said) == (model != "sample")
    assert httpx.post(f"{url}/v1/completions", timeout=30).status_code == 401
    bearer = {"Authorization": f"Bearer {keys['api_key']}"}
    assert httpx.post(f"{url}/v1/completions", headers=bearer, timeout=30).status_code == 400
    end = time.monotonic() + 60
    videos = {title for title, _ in QUERIES.queries() if title.startswith("Video")}
    assert len(videos) == 3
    empty, without = {title for title, _ in QUERIES.queries()}, set()
    if model == "sample":
        without = {*videos, "Share of video tokens kept, by policy and level"}
    while empty != without and time.monotonic() < end:
        time.sleep(2)
        asked = [(title, QUERIES.ask(prometheus, query)) for title, query in QUERIES.queries()]
        empty = {title for title, found in asked if not found}
    assert empty == without, "panels without data"
    strong = '{level="strong"}'
    shares = {"image": 16 / 144} if model == "sample" else {"image": 3 / 25, "video": 8 / 80}
    for kind, right in shares.items():
        after, before = (f"sum(era:{kind}_tokens_{w}_total{strong})" for w in ("after", "before"))
        ((_, share),) = QUERIES.ask(prometheus, f"{after} / {before}")
        assert share == pytest.approx(right)
    assert not QUERIES.ask(prometheus, 'ALERTS{alertstate="firing"}')


@contextmanager
def answering(answers: dict[str, object]) -> Iterator[tuple[str, list[tuple[str, str | None]]]]:
    """Yield a server's URL, and the paths and keys that it was asked with; no path, no 200."""
    asked: list[tuple[str, str | None]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:  # noqa: N802
            asked.append((self.path, self.headers["Authorization"]))
            self.send_response(200 if self.path in answers else 404)
            self.end_headers()
            self.wfile.write(json.dumps(answers.get(self.path)).encode())

        def log_message(self, *_: object) -> None:
            """Say nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}", asked
        server.shutdown()


def test_the_dashboard_has_a_row_for_each_modality() -> None:
    panels = json.loads(QUERIES.DASHBOARD.read_text())["panels"]
    rows = {panel["title"]: panel["gridPos"]["y"] for panel in panels if panel["type"] == "row"}
    for kind, row in {"image": "Pruning: pictures", "video": "Pruning: videos"}.items():
        own = [panel for panel in panels if panel["gridPos"]["y"] == rows[row] + 1]
        asked = [target["expr"] for panel in own for target in panel["targets"]]
        assert len(own) == 4 and all(f"era:{kind}" in e or "clamped" in e for e in asked)
    places = [tuple(panel["gridPos"].values()) for panel in panels]
    assert len(set(places)) == len(places) == len({panel["id"] for panel in panels})


def test_a_video_of_nothing_is_read_by_any_decoder(tmp_path: Path) -> None:
    cv2 = pytest.importorskip("cv2")
    made = [CLIP.clip(random.Random(seed), 96, 64, frames=5, fps=4) for seed in (0, 0, 1)]
    assert made[0] == made[1] != made[2]
    (tmp_path / "clip.mp4").write_bytes(made[0])
    film = cv2.VideoCapture(str(tmp_path / "clip.mp4"))
    assert film.get(cv2.CAP_PROP_FPS) == 4
    frames = []
    while (read := film.read())[0]:
        frames.append(read[1])
    assert [frame.shape for frame in frames] == [(64, 96, 3)] * 5
    squares = {tuple(frame[::16, ::16, 0].flatten().tolist()) for frame in frames}
    assert len(squares) == 5 and all((frame[:16, :16] == frame[0, 0]).all() for frame in frames)


def test_smoke_takes_the_first_key_of_a_file_with_comments(tmp_path: Path) -> None:
    (tmp_path / "deploy" / "secrets").mkdir(parents=True)
    (tmp_path / "era_vllm").symlink_to(ROOT / "era_vllm")
    (tmp_path / "deploy" / "loadtest").symlink_to(DEPLOY / "loadtest")
    for name in ("smoke.sh", "smoke.py"):
        shutil.copy(DEPLOY / name, tmp_path / "deploy")
    (tmp_path / "deploy" / "secrets" / "api_keys").write_text("# two clients\n\n  one \ntwo\n")
    (tmp_path / "deploy" / "secrets" / "metrics_key").write_text("# Prometheus\nthree\n")
    models = {"data": [{"id": "m"}]}
    environment = {name: value for name, value in os.environ.items() if not name.endswith("_KEY")}
    facts = {"modalities": ["image"], "policy": "era", "levels": {}}
    with answering({"/ready": {}, "/v1/models": models, "/v1/era": facts}) as (url, asked):
        command = [str(tmp_path / "deploy" / "smoke.sh"), url]
        subprocess.run(command, env=environment, capture_output=True, timeout=60)
    own = [("/v1/models", "Bearer one"), ("/v1/era", "Bearer one"), ("/metrics", "Bearer three")]
    assert asked == [("/ready", None), *own]


def test_a_load_test_of_a_server_that_is_up_is_named_after_its_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loadtest = load(DEPLOY / "loadtest" / "run.py")
    cell = {"level": "off", "concurrency": 1, "failed": 0, **dict.fromkeys(loadtest.MEASURES, 1.0)}
    swept: list[str] = []

    def sweep(url: str, model: str, *_: object) -> list[dict[str, object]]:
        swept.append(model)
        return [cell]

    monkeypatch.setattr(loadtest, "sweep", sweep)
    monkeypatch.syspath_prepend(DEPLOY / "loadtest")
    models = {"data": [{"id": "/models/llava-1.5"}]}
    facts = {"policy": "era", "modalities": ["image"]}
    with answering({"/v1/models": models, "/v1/era": facts}) as (url, _):
        arguments = ["run.py", "--url", url, "--out", str(tmp_path)]
        monkeypatch.setattr(sys, "argv", arguments)
        assert loadtest.main() == 0
        monkeypatch.setattr(sys, "argv", [*arguments, "--video", ".5"])
        with pytest.raises(EraError, match="--video: got a server that takes image"):
            loadtest.main()
    report = json.loads((tmp_path / "models-llava-1.5.json").read_text())
    assert report["model"] == f"/models/llava-1.5 at {url}" and report["era"] == facts
    with answering({"/v1/models": models}) as (url, _):  # what would be lost behind the sweep
        monkeypatch.setattr(sys, "argv", ["run.py", "--url", url, "--out", str(tmp_path)])
        with pytest.raises(EraError, match="answered 404; needed a server with era_vllm"):
            loadtest.main()
    assert swept == ["/models/llava-1.5"]


@pytest.mark.vllm
@pytest.mark.filterwarnings("ignore")  # torch and vLLM use what they deprecate
@pytest.mark.parametrize(("share", "videos"), [(0, 0), (0.25, 2), (0.4, 4), (1, 10)])
def test_a_share_of_the_requests_are_videos(
    share: float, videos: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(DEPLOY / "loadtest")
    client = load(DEPLOY / "loadtest" / "client.py")
    path = client.write_requests(tmp_path / "all", 10, client.Asked(64, share, 32, 2), 3)
    contents = [json.loads(line)["content"] for line in path.read_text().splitlines()]
    kinds = [content[0]["type"] for content in contents]
    assert kinds.count("video_url") == videos and len(kinds) == 10
    assert len({json.dumps(content) for content in contents}) == 10
    stock = client.CustomImageDataset._process_content_part
    assert client._part(client.CustomImageDataset, contents[-1][1]) == contents[-1][1]
    assert stock(contents[-1][1]) == contents[-1][1]
    if videos:
        with pytest.raises(ValueError, match="video_url"):  # else our way around is not needed
            stock(next(content[0] for content in contents if content[0]["type"] == "video_url"))


@pytest.mark.slow
@pytest.mark.vllm
@pytest.mark.parametrize("model", ["sample", "qwen3-vl"])
def test_soak(model: str, tmp_path: Path) -> None:
    soak = [sys.executable, DEPLOY / "loadtest" / "soak.py", "--out", tmp_path]
    if model != "sample":
        soak += ["--model", random_qwen(tmp_path / "model")]
    # a machine with other work has more capacity a minute later than it was seen to have
    brief = "--seconds", 45, "--asks", 80, "--memory", 1000, "--overload", 4
    run(*soak, *brief, timeout=500)
    report = json.loads((tmp_path / "soak.json").read_text())
    assert report["soak"] and len(report["checks"]) >= 12
    assert ("video" in report["requests"]["modalities"]) == (model != "sample")


@pytest.mark.slow
@pytest.mark.vllm
def test_load_test(tmp_path: Path) -> None:
    command = [sys.executable, DEPLOY / "loadtest" / "run.py", "--out", tmp_path]
    run(*command, "--levels", "off,strong", "--concurrency", "1,2", "--requests", 4, timeout=500)
    report = json.loads((tmp_path / "sample.json").read_text())
    assert (tmp_path / "sample.png").stat().st_size > 10_000
    tokens = {cell["level"]: cell["prompt_tokens"] for cell in report["cells"]}
    assert tokens["off"] - tokens["strong"] == 144 - 16
    assert all(cell["rps"] > 0 and cell["failed"] == 0 for cell in report["cells"])


@pytest.mark.slow
@pytest.mark.vllm
def test_load_test_with_videos(tmp_path: Path) -> None:
    command = [sys.executable, DEPLOY / "loadtest" / "run.py", "--model", "qwen3-vl-tiny"]
    command += ["--out", tmp_path, "--side", 256, "--server", "--dtype float32"]
    command += ["--levels", "off,strong", "--concurrency", 2, "--requests", 8, "--video", 0.5]
    run(*command, timeout=500)
    cells = json.loads((tmp_path / "dummy-qwen3-vl-tiny.json").read_text())["cells"]
    assert all(cell["failed"] == 0 and cell["rps"] > 0 for cell in cells)
    tokens = {cell["level"]: cell["prompt_tokens"] for cell in cells}
    # half are pictures of 8 x 8 tokens, half videos of four frames of 4 x 4
    assert tokens["off"] - tokens["strong"] == ((64 - 7) + 4 * (16 - 2)) / 2
