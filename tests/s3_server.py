"""An S3 server on loopback: moto's, which keeps all in memory and trusts every signature.

`python tests/s3_server.py BUCKET` prints its port and serves until it is killed.
"""

import contextlib
import io
import subprocess
import sys
import threading
from collections.abc import Iterator

S3 = "http://s3.amazonaws.com"


@contextlib.contextmanager
def serving(bucket: str) -> Iterator[dict[str, str]]:
    """A server in a process of its own; the environment in which it is the store."""
    command = [sys.executable, __file__, bucket]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as server:
        try:
            assert server.stdout
            yield {
                "AWS_ENDPOINT_URL": f"http://127.0.0.1:{server.stdout.readline().strip()}",
                "AWS_REGION": "us-east-1",
                "AWS_ACCESS_KEY_ID": "AKIATEST",
                "AWS_SECRET_ACCESS_KEY": "secret-of-the-test",
            }
        finally:
            server.kill()


def atomic(application):
    """One request at a time: moto looks at a condition and writes in two steps, S3 in one."""
    from werkzeug.wsgi import get_input_stream

    lock = threading.Lock()

    def answer(environ, start_response):
        content = get_input_stream(environ).read()
        environ |= {"wsgi.input": io.BytesIO(content), "wsgi.input_terminated": True}
        with lock:
            return list(application(environ, start_response))

    return answer


if __name__ == "__main__":
    from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import make_server
    from werkzeug.test import Client

    application = atomic(DomainDispatcherApplication(create_backend_app))
    assert Client(application).put(f"/{sys.argv[1]}", base_url=S3).status_code == 200
    server = make_server("127.0.0.1", 0, application, threaded=True)
    print(server.server_port, flush=True)
    server.serve_forever()
