"""A fake Hub, and an empty cache for each test."""

import pytest

pytest.importorskip("starlette")
pytest.importorskip("uvicorn")
import huggingface_hub.constants

from tests.hub.fake_hub import FakeHub, listening


@pytest.fixture
def hub(monkeypatch, tmp_path):
    fake = FakeHub()
    with listening(fake, monkeypatch, tmp_path):
        yield fake


@pytest.fixture
def offline(hub, monkeypatch):
    """A function after which no request leaves this process."""
    return lambda: monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
