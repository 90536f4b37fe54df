"""What the browser test stands on: a Chromium, and a JupyterLab behind a token."""

import contextlib
import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
SETTINGS = {  # of JupyterLab: every cell stays in the page, nothing is fetched from outside
    "@jupyterlab/notebook-extension/tracker": {"windowingMode": "none", "recordTiming": False},
    "@jupyterlab/apputils-extension/notification": {"fetchNews": "false", "checkForUpdates": False},
}


def chromium() -> str | None:
    """Path of a Chromium, installed where there is none; None for the one that Playwright keeps itself.

    Raises:
        RuntimeError: none is there and none could be installed.
    """
    if found := next(filter(None, map(shutil.which, NAMES)), None):
        return found
    quiet = {"env": os.environ | {"DEBIAN_FRONTEND": "noninteractive"}, "stdout": subprocess.DEVNULL}
    if not os.geteuid() and shutil.which("apt-get"):
        print("installing chromium", flush=True)
        for command in (["update", "-qq"], ["install", "-y", "-qq", "--no-install-recommends", "chromium"]):
            subprocess.run(["apt-get", *command], **quiet)
        if found := shutil.which("chromium"):
            return found
    if subprocess.run([sys.executable, "-m", "playwright", "install", "chromium"], **quiet).returncode:
        raise RuntimeError(f"No Chromium: none of {', '.join(NAMES)} is installed, and neither apt-get (needs root on "
                           "Debian) nor `playwright install chromium` (needs the network) brought one. Install "
                           "Chromium, then run `make test-browser` again.")
    return None


class Server:
    """A running JupyterLab: `url`, `token`, and `get` as anybody on the machine would send it."""

    def __init__(self, url, token):
        self.url, self.token = url, token

    def kernel_is_idle(self, place):
        """Has the notebook at `place` a kernel that a page is connected to and that waits for work?"""
        sessions = json.loads(self.get("/api/sessions", self.token)[2])
        kernels = [session["kernel"] for session in sessions if session["path"] == place]
        return [(k["execution_state"], k["connections"]) for k in kernels] == [("idle", 1)]

    def get(self, path, token=None):
        """(status, place that a redirect names, body); a redirect is not followed."""
        request = urllib.request.Request(self.url + path)
        if token:
            request.add_header("Authorization", f"token {token}")
        try:
            with urllib.request.build_opener(_Stay).open(request, timeout=30) as answer:
                return answer.status, "", answer.read()
        except urllib.error.HTTPError as error:
            return error.code, error.headers.get("Location", ""), error.read()


class _Stay(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_):
        return None


@contextlib.contextmanager
def jupyterlab(folder: Path):
    """JupyterLab on a free port, with a token of its own and the settings above; logs and settings go to `folder`."""
    for name, settings in SETTINGS.items():
        path = folder / "settings" / f"{name}.jupyterlab-settings"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(settings))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    token = secrets.token_hex(16)
    own = {"JUPYTERLAB_SETTINGS_DIR": folder / "settings", "JUPYTERLAB_WORKSPACES_DIR": folder / "workspaces",
           "JUPYTER_CONFIG_DIR": folder / "config", "JUPYTER_PATH": Path(sys.prefix, "share", "jupyter"),
           "JUPYTER_TOKEN": token, "PYTHONHASHSEED": 0}  # in the environment: a command line can be read by others
    environment = os.environ | {name: str(value) for name, value in own.items()}
    environment.pop("USJEPA_EXERCISE", None)  # here a browser moves the widgets
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--ServerApp.ip=127.0.0.1", f"--port={port}",
               "--ServerApp.port_retries=0", f"--ServerApp.root_dir={ROOT}"]
    with open(folder / "jupyterlab.log", "w") as log:
        server = subprocess.Popen([*command, *([] if os.geteuid() else ["--allow-root"])], cwd=ROOT, env=environment,
                                  stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT)
        try:
            lab = Server(f"http://127.0.0.1:{port}", token)
            end = time.monotonic() + 120
            while True:
                with contextlib.suppress(OSError):
                    if lab.get("/api/status", token)[0] == 200:
                        break
                if server.poll() is not None or time.monotonic() > end:
                    raise RuntimeError(f"JupyterLab did not come up; {log.name} says why")
                time.sleep(0.3)
            yield lab
        finally:
            server.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                server.wait(20)
            server.kill()
