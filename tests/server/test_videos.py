"""Videos for the families that will take them: bounds, lies, and what vLLM samples.

None takes one yet; ``takes_video`` opens the connector, which is where they will come in.
"""

import asyncio
import base64
import gc
import os
import re
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
from vllm.exceptions import GracefulHTTPError, VLLMValidationError
from vllm.multimodal.media import MEDIA_CONNECTOR_REGISTRY, MediaConnector
from vllm.multimodal.video import VIDEO_LOADER_REGISTRY

from era_vllm.compat import video_capture
from era_vllm.decoder_process import RefusedError
from era_vllm.errors import UnsupportedError
from era_vllm.videos import VideoBounds, check_opened
from era_vllm.vllm_plugin.requests import request_context
from era_vllm_server import addresses, decoders, media, videos
from era_vllm_server.front import CONNECTOR
from tests.server import clips
from tests.server.attacker import picture, png
from tests.server.clips import h264, shade, written

pytest_plugins = ["tests.server.guarded"]
BOUNDS = VideoBounds()
LEAK = re.compile(r"0x[0-9a-f]{6}|object at|/\w+/\w+|Errno|127\.|BytesIO|\.py|cv2|FFMPEG|Traceback")
HUGE = (15360, 15360)
"""354 MB a frame; FFmpeg itself has none of 16384 x 16384."""


@pytest.fixture(autouse=True)
def _takes_video(monkeypatch):
    """Open the connector, with processes of the test's own, that end with it."""
    pool = decoders.Decoders(2, "video", videos._COMMAND, videos.OPTIONS)
    monkeypatch.setattr(videos, "_decoders", lambda _: pool)
    yield
    end = time.monotonic() + 5
    while pool._free.qsize() < 2:  # one that was cancelled is about to be given back
        assert time.monotonic() < end
        time.sleep(0.05)
    close(pool)
    assert not children()


def close(pool):
    while not pool._free.empty():
        if (process := pool._free.get_nowait()) is not None:
            process.end()


def children():
    """Processes for videos of this one, that are not dead."""
    found = set()
    for status in Path("/proc").glob("[0-9]*/status"):
        try:
            text = status.read_text()
            ours = re.search(r"PPid:\s+(\d+)", text)[1] == str(os.getpid())
            if ours and b"era_vllm.videos" in (status.parent / "cmdline").read_bytes():
                found.add(int(status.parent.name))
        except OSError:
            continue
    return found


def url_of(data):
    return "data:video/mp4;base64," + base64.b64encode(data).decode()


def sampling(**options):
    return {"media_io_kwargs": {"video": options}}


def connector(**options):
    return MEDIA_CONNECTOR_REGISTRY.load(CONNECTOR, **options)


def load(data, **options):
    return connector(**options).fetch_video(url_of(data)).media


@contextmanager
def bounds(monkeypatch, **changed):
    with monkeypatch.context() as context:
        given = replace(BOUNDS, **changed)
        context.setattr(media, "VideoBounds", lambda **_: given)
        yield


@contextmanager
def refusal(said):
    with pytest.raises(VLLMValidationError, match="the video is refused: .*" + said) as error:
        yield
    assert not LEAK.search(str(error.value)), str(error.value)


GOOD = {
    "MP4, H.264": h264(),
    "MP4, H.264, two rates": h264(durations=[(10, 5), (20, 50)]),
    "MP4, H.264, frames of other sizes": h264(4, sizes=[(32, 32), (128, 96), (64, 48)]),
    "WebM, VP9, the end cut off": written("webm", "VP90")[:700],
    "MP4, H.264, with sound": h264(more=clips.sound()),
    "GIF": clips.gif(),
    **{name: written(*kind) for name, kind in clips.WRITTEN.items()},
}
LOADERS = sorted(
    name
    for name in VIDEO_LOADER_REGISTRY.name2class
    if not VIDEO_LOADER_REGISTRY.backend_requires_gpu(name)
)


def frames_alike(ours, stock):
    assert ours[0].tobytes() == stock[0].tobytes() and ours[0].shape == stock[0].shape
    assert ours[1] == stock[1]
    return len(ours[0])


@pytest.mark.parametrize("name", GOOD)
def test_what_is_loaded_is_stocks_to_the_pixel(name):
    data = GOOD[name]
    for options in ({}, {"num_frames": 8}, {"num_frames": -1}, {"fps": 2, "num_frames": -1}):
        ours = connector(**sampling(**options)).fetch_video(url_of(data))
        stock = MediaConnector(**sampling(**options)).fetch_video(url_of(data))
        assert frames_alike(ours.media, stock.media)
        assert (ours.original_bytes, ours.io_config) == (data, stock.io_config)


@pytest.mark.parametrize("loader", LOADERS)
def test_every_loader_of_vllms_samples_as_it_does(loader):
    """By the names under which models choose them; each has frames of its own choice."""
    same = 0
    for options in ({}, {"num_frames": 4, "fps": 2}, {"fps": 1, "frame_recovery": True}):
        kwargs = sampling(video_backend=loader, **options)
        for data in (GOOD["MP4, H.264"], GOOD["WebM, VP9"], GOOD["WebM, VP9"][:700]):
            try:
                stock = MediaConnector(**kwargs).fetch_video(url_of(data)).media
            except IndexError:  # of a loader that keeps no frame of the one that is cut off
                with refusal("of its frames 0 are sampled"):
                    load(data, **kwargs)
            else:
                assert frames_alike(load(data, **kwargs), stock)
                same += 1
    assert same >= 8, "of three files in three ways"


def test_the_sampled_frames_are_those_that_it_says():
    """Their greys tell, whatever stock does."""
    frames, facts = load(h264(20), **sampling(num_frames=5))
    assert facts["frames_indices"] == [0, 4, 9, 14, 19]
    greys = frames.mean(axis=(1, 2, 3))
    assert np.abs(greys - [shade(at) for at in facts["frames_indices"]]).max() < 3


def test_a_changing_frame_rate_is_sampled_by_number_not_by_time():
    """Half of these frames are in the first 0.5 s of 5.5; docs/security.md says so."""
    _, facts = load(h264(20, durations=[(10, 5), (10, 50)]), **sampling(num_frames=4))
    assert facts["fps"] == pytest.approx(20 / 5.5)
    even = np.linspace(0, facts["total_num_frames"] - 1, 4, dtype=int).tolist()
    assert facts["frames_indices"] == even and even[1] < 10  # by time it would be frame 12


def test_nothing_is_opened_in_this_process(monkeypatch):
    def none_here(*_):
        raise AssertionError("opened here")

    monkeypatch.setattr(cv2, "VideoCapture", none_here)
    assert len(load(h264())[0]) == 30
    with pytest.raises(AssertionError, match="opened here"):
        MediaConnector().fetch_video(url_of(h264()))


def test_one_frame_alone_is_a_clear_400():
    """vLLM gives none of them, which its processors do not expect."""
    for data in (h264(1), written("mp4", "mp4v", 1)):
        assert not len(MediaConnector().fetch_video(url_of(data)).media[0])
        with refusal("it has one frame alone, which vLLM does not read; send a picture"):
            load(data)


# ---- bounds ----------------------------------------------------------------------------------


def test_a_refused_header_is_a_400_and_its_process_lives_on():
    tall, long = h264(1, says_size=(16384, 16384)), h264(says_seconds=36_000)
    for data, said in {
        tall: "its frames have 16384 x 16384 pixels, allowed are 8388608 each",
        long: "it lasts 36000 s, allowed are 600 s",
        h264(says_frames=10**6): "it has 1000000 frames, allowed are 36000",
        png(picture()): "its format is a picture's, allowed are MP4, MOV, WebM, MKV, GIF",
        b"#EXTM3U\nfile:///etc/passwd\n": "its format is a list of other files",
        written("mkv", "FFV1"): "its codec is V_FFV1, allowed are H264, HEVC",
    }.items():
        assert len(data) < 200_000
        with refusal(said):
            load(data)
    assert len(load(h264(2))[0]) == 2 and len(children()) == 1


def test_bounds_are_inclusive(monkeypatch):
    exact = {"frames": 30, "seconds": 3.0, "frame_pixels": 64 * 48, "sampled_frames": 30}
    everything = sampling(num_frames=-1)
    with bounds(monkeypatch, **exact):
        assert len(load(h264(), **everything)[0]) == 30
    for name, said in {
        "frames": "it has 30 frames, allowed are 29",
        "seconds": "it lasts 3 s, allowed are 2 s",
        "frame_pixels": "64 x 48 pixels, allowed are 3071 each",
        "sampled_frames": "of its frames 30 are sampled, allowed are 1 to 29",
    }.items():
        with bounds(monkeypatch, **exact | {name: exact[name] - 1}), refusal(said):
            load(h264(), **everything)


def test_a_longer_file_than_a_pictures_is_refused(monkeypatch):
    monkeypatch.setenv("ERA_MAX_DATA_URL_BYTES", "20000")
    with refusal("its data URL is [0-9]+ bytes long, allowed are 20000"):
        load(h264())


async def together(*urls, **options):
    """Load as vLLM does for one request: at once."""
    with request_context():
        loads = (connector(**options).fetch_video_async(url) for url in urls)
        return await asyncio.gather(*loads, return_exceptions=True)


@pytest.fixture
def held(monkeypatch):
    counted = media.Held()
    monkeypatch.setattr(media, "_HELD", counted)
    return counted


def test_the_sampled_pixels_of_a_request_are_bounded_before_they_are_decoded(held, monkeypatch):
    """Pictures count too; frames that are not sampled do not."""
    eight = 8 * 64 * 48
    monkeypatch.setenv("ERA_MAX_REQUEST_PIXELS", str(2 * eight))
    url = url_of(h264())
    found = asyncio.run(together(url, url, **sampling(num_frames=8)))
    assert [len(one.media[0]) for one in found] == [8, 8]
    found = asyncio.run(together(url, url, **sampling(num_frames=9)))
    (over,) = {str(one) for one in found if isinstance(one, VLLMValidationError)}
    assert f"have {18 * 64 * 48} pixels, allowed are {2 * eight} in all" in over


def test_all_requests_hold_so_many_frames_until_nobody_needs_them(held, monkeypatch):
    pixels = 8 * 64 * 48
    monkeypatch.setenv("ERA_MAX_REQUEST_PIXELS", str(pixels))
    kept = [load(h264(), **sampling(num_frames=8)) for _ in range(8)]
    with pytest.raises(GracefulHTTPError, match="fill the memory"):
        load(h264(), **sampling(num_frames=8))
    frames = kept.pop()[0][2:]  # a part of them keeps all
    gc.collect()
    with pytest.raises(GracefulHTTPError):
        load(h264(), **sampling(num_frames=8))
    del frames
    gc.collect()
    assert len(load(h264(), **sampling(num_frames=8))[0]) == 8
    assert len(children()) == 1


def peak_mb(pid="self"):
    return int(re.search(r"VmHWM:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())[1]) / 1000


def test_frames_that_are_not_sampled_take_no_memory_here():
    data = written("webm", "VP80", 200, (640, 480))  # 184 MB of frames
    load(data, **sampling(num_frames=2))
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = peak_mb()
    frames, facts = load(data, **sampling(num_frames=8))
    assert (len(frames), facts["frames_indices"][-1]) == (8, 199)
    grown = peak_mb() - before
    print(f"8 of 200 frames, 7 MB: {grown:.0f} MB more at the peak")
    assert grown < 40


# ---- lies ------------------------------------------------------------------------------------


def test_what_the_decoder_finds_is_checked_again():
    for values, said in {
        (4096.0, 4096.0, 10.0, 30.0): "4096 x 4096 pixels",
        (640.0, 480.0, 10.0, 1e6): "it has 1000000 frames",
        (640.0, 480.0, 1e-3, 100.0): "it lasts 100000 s",
        (640.0, 480.0, -1.0, 100.0): "it has -1 frames a second",
        (640.0, 480.0, float("nan"), 1.0): "no frame of it can be decoded",
        (640.0, 480.0, 10.0, float("inf")): "no frame of it can be decoded",
        (0.0, 0.0, 10.0, 30.0): "no frame of it can be decoded",
    }.items():
        with pytest.raises(RefusedError, match=said):
            check_opened(*values, BOUNDS)
    check_opened(640.0, 480.0, 0.0, -9.2e18, BOUNDS)  # neither rate nor count is known


def test_a_small_header_before_large_frames():
    """Of 1 MB, and 354 MB a frame: the decoder says so when it has opened the file."""
    data = h264(1, HUGE, says_size=(64, 48), flat=True)
    assert len(data) < 1_000_000
    with refusal("its frames have 15360 x 15360 pixels|no frame of it can be decoded"):
        load(data)
    assert len(load(h264(2))[0]) == 2


def test_frames_that_grow_have_a_cap_of_memory(monkeypatch):
    """The first ones are small, so that only the cap of the process is left."""
    data = h264(3, sizes=[HUGE], flat=True)
    load(h264(2))
    (child,) = children()
    for pixels, most in ((2**27, 10_000), (2**16, 340)):
        Path(f"/proc/{child}/clear_refs").write_text("5")
        before = peak_mb(child)
        with bounds(monkeypatch, frame_pixels=pixels):
            try:
                assert len(load(data)[0])
            except VLLMValidationError as error:
                assert not LEAK.search(str(error))
        grown = peak_mb(child) - before if children() == {child} else 0
        print(f"bound of {pixels} pixels: {grown:.0f} MB more at the peak")
        assert grown < most
        assert (grown > 300) == (pixels == 2**27)
    assert len(load(h264(2))[0]) == 2


def test_fewer_frames_said_than_there_are(monkeypatch):
    """What its tables do not name is not read."""
    data = h264(30, says_frames=5)
    assert len(load(data)[0]) == len(MediaConnector().fetch_video(url_of(data)).media[0]) <= 5


@pytest.mark.parametrize("cut", [40, 5000, -2000, -300, -1])
def test_a_file_that_is_cut_off_is_stocks_frames_or_a_clear_400(cut):
    """Of an MP4 whose header stands at its end nothing is left, of a WebM what came before."""
    same = 0
    for data in (h264()[:cut], written("webm", "VP80", 60)[:cut], clips.gif()[:cut]):
        try:
            stock = MediaConnector().fetch_video(url_of(data)).media
        except ValueError:  # vLLM's own, of one that it cannot open
            stock = None
        if stock is not None and len(stock[0]):
            assert frames_alike(load(data), stock)
            same += 1
        else:
            with refusal("truncated, or damaged"):
                load(data)
    assert same == (0 if cut == 40 else 2)


def test_ffmpeg_has_the_list_of_containers_too(tmp_path):
    """For what our own reader of headers takes for something else."""
    (tmp_path / "clip").write_bytes(written("avi", "MJPG"))
    script = """if True:
        import cv2, io, sys
        with open(sys.argv[1], "rb") as file:
            capture = cv2.VideoCapture(io.BytesIO(file.read()), cv2.CAP_FFMPEG, [])
        print(capture.isOpened() and capture.read()[0])
    """
    for more, said in ((videos.OPTIONS, "False"), ({}, "True")):
        command = [sys.executable, "-c", script, str(tmp_path / "clip")]
        out = subprocess.check_output(command, env=os.environ | more, text=True)
        assert out.split() == [said]


def test_nothing_of_a_file_is_logged(capfd):
    with refusal(""):
        load(written("mp4", "mp4v").replace(b"moov", b"mo\nv"))
    whole = written("mp4", "mp4v", 60)
    assert len(load(whole[:1000] + bytes(1000) + whole[2000:])[0])
    out, err = capfd.readouterr()
    assert "matroska" not in out + err and "mov," not in out + err


# ---- processes -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def slow():
    """2 MB that take some 8 s: 700 frames of 1920 x 1088."""
    return h264(700, (1920, 1088), flat=True, durations=[(700, 1)])


def test_one_that_takes_too_long_is_ended_and_the_next_one_served(slow, monkeypatch):
    load(h264(2))
    (first,) = children()
    with bounds(monkeypatch, decode_s=0.5), refusal("too long to decode, allowed are 0.5 s"):
        load(slow, **sampling(num_frames=2))
    assert not children() and not Path(f"/proc/{first}").exists()
    assert len(load(h264(2))[0]) == 2


def test_one_whose_request_ends_is_ended(slow):
    url = url_of(slow)

    async def leave():
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(connector().fetch_video_async(url), 2)

    for each in (leave(), together(url, url, "gopher://x")):
        began, files = time.monotonic(), len(os.listdir("/proc/self/fd"))
        asyncio.run(each)
        while children():
            assert time.monotonic() - began < 6
            time.sleep(0.05)
        time.sleep(0.2)
        gc.collect()
        assert len(os.listdir("/proc/self/fd")) <= files + 3
    assert len(load(h264(2))[0]) == 2


def test_one_that_dies_is_said(slow, monkeypatch):
    async def run():
        with request_context():
            task = asyncio.create_task(connector().fetch_video_async(url_of(slow)))
            while not children():
                await asyncio.sleep(0.05)
            await asyncio.sleep(1)
            os.kill(*children(), signal.SIGSEGV)
            with refusal("decoding it ended the process; is it damaged"):
                await task

    asyncio.run(run())
    assert len(load(h264(2))[0]) == 2


def test_who_waits_too_long_for_others_is_to_come_again(slow, monkeypatch):
    url = url_of(slow)

    async def run():
        tasks = [asyncio.create_task(connector().fetch_video_async(url)) for _ in range(2)]
        while len(children()) < 2:
            await asyncio.sleep(0.05)
        said = "the video waited 0.2 s for others"
        with bounds(monkeypatch, decode_s=0.2), pytest.raises(GracefulHTTPError, match=said):
            await connector().fetch_video_async(url_of(h264(2)))
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)

    asyncio.run(run())


LIARS = {
    "more frames than were counted": ('{"value": [48, 64, 3]}', "more frames than were to be"),
    "another size": ('{"value": [4800, 6400, 3]}', "its frames change"),
    "no colours": ('{"value": [48, 64]}', "its frames change"),
    "no JSON": ("{{", "could not be read"),
}


@pytest.mark.parametrize("name", LIARS)
def test_a_decoder_that_was_taken_over_gains_nothing(name, monkeypatch):
    """It says what it likes of frames, and gives as many as it likes."""
    answer, said = LIARS[name]
    script = f"""if True:
        import json, socket, sys
        parent = socket.socket(fileno=int(sys.argv[1]))
        parent.send(b"{{}}")
        while message := parent.recv(2**16):
            asked = json.loads(message)[0]
            answers = {{"open": '{{"value": [64, 48, 10, 30]}}', "retrieve": {answer!r}}}
            parent.send(answers.get(asked, '{{"value": 1}}').encode())
    """
    pool = decoders.Decoders(1, "video", (sys.executable, "-c", script))
    monkeypatch.setattr(videos, "_decoders", lambda _: pool)
    data = h264(2)
    if name == "more frames than were counted":

        class Greedy(type(VIDEO_LOADER_REGISTRY.load("opencv"))):
            @classmethod
            def read_frames(cls, cap, frame_idx, total_frames_num, *, frame_recovery=False):
                return np.stack([cap.read()[1] for _ in range(50)]), frame_idx

        monkeypatch.setitem(VIDEO_LOADER_REGISTRY.name2class, "opencv", Greedy)
    with refusal(said):
        load(data)
    close(pool)


# ---- where it comes from ---------------------------------------------------------------------


def test_a_video_by_url_meets_what_a_picture_meets(target, monkeypatch):
    hits = len(target.hits)
    with refusal("--allowed-media-domains is not set"):
        connector().fetch_video("http://example.com/a.mp4")
    with refusal("could not be fetched from a public address"):
        connector(allowed_media_domains=["localhost"]).fetch_video(target.url("localhost"))
    with refusal("no such file below|this server reads no files"):
        connector().fetch_video("file:///etc/passwd")
    assert len(target.hits) == hits
    monkeypatch.setattr(addresses, "is_public", lambda address: address == "127.0.0.1")
    monkeypatch.setattr(media, "_download_limit", lambda: 2**20)
    allowed = connector(allowed_media_domains=["localhost"])
    for path, said in {
        "/picture.png": "its format is a picture's",  # it was fetched
        "/redirect": "answers 302",
        "/large": "more than 1048576 bytes",
    }.items():
        with refusal(said):
            allowed.fetch_video(target.url("localhost", path))
    assert target.hits[hits:] == ["/picture.png", "/redirect", "/large"]


def test_a_video_of_a_folder_that_is_allowed(tmp_path):
    (tmp_path / "clip.webm").write_bytes(written("webm", "VP90"))
    allowed = connector(allowed_local_media_path=str(tmp_path))
    assert len(allowed.fetch_video(f"file://{tmp_path}/clip.webm").media[0]) == 30


def test_pictures_one_after_another_are_no_video():
    """vLLM's ``video/jpeg``."""
    jpeg = base64.b64encode(png(picture())).decode()
    with refusal("it holds ',' .several pictures: send each by itself"):
        connector().fetch_video(f"data:video/jpeg;base64,{jpeg},{jpeg}")


@pytest.mark.parametrize(
    "options", [{"backend": "torchcodec"}, {"video_backend": "pynvvideocodec"}]
)
def test_decoders_that_run_in_this_process_are_not_used(options):
    with refusal("by vLLM's backend 'opencv' alone"):
        load(h264(2), **sampling(**options))
    assert not children()


def test_another_vllm_that_opens_videos_elsewhere_is_said(monkeypatch):
    video_capture._replace.cache_clear()
    monkeypatch.delattr(video_capture.OpenCVVideoBackendMixin, "open_video_capture")
    said = "open_video_capture: not found with one argument"
    with pytest.raises(UnsupportedError, match=said), video_capture.opening(bytes):
        pass
    monkeypatch.undo()


def test_the_bounds_are_settings(monkeypatch):
    media._settings.cache_clear()
    monkeypatch.setenv("ERA_MAX_VIDEO_SECONDS", "0.5")
    with refusal("allowed are 0.5"):
        load(h264(frames=30))
    monkeypatch.undo()
    media._settings.cache_clear()
