"""Pictures and videos as files: what is put in comes out again."""

from io import BytesIO

import cv2
import numpy as np
from PIL import Image

from era_vllm.lab.media import mp4, png


def test_a_picture_is_sent_as_it_is() -> None:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 48, 3), np.uint8))
    part = png(image).part()
    assert part["type"] == "image_url"
    opened = Image.open(BytesIO(png(image).data))
    assert (np.asarray(opened) == np.asarray(image)).all()


def test_a_video_keeps_its_frames_their_order_and_their_rate(tmp_path) -> None:
    colors = [(250, 20, 20), (20, 250, 20), (20, 20, 250), (240, 240, 240), (10, 10, 10)]
    medium = mp4([Image.new("RGB", (64, 48), color) for color in colors], 2.0)
    assert str(medium.part()["video_url"]["url"]).startswith("data:video/mp4;base64,")
    path = tmp_path / "video.mp4"
    path.write_bytes(medium.data)
    capture = cv2.VideoCapture(str(path))
    assert capture.get(cv2.CAP_PROP_FPS) == 2.0
    for color in colors:
        there, frame = capture.read()
        assert there
        assert np.abs(frame[..., ::-1].mean((0, 1)) - color).max() < 12
    assert not capture.read()[0]
