"""Serves the files of a folder by HTTP, with ranges: ranges.py FOLDER [CERTIFICATE KEY]. Its port is its first line.

The file `most` in the folder says how many ranges were asked for at once.
"""
import http.server
import os
import re
import ssl
import sys
import threading
import time

lock = threading.Lock()
now = most = 0


def count(step):
    global now, most
    with lock:
        now += step
        if now > most:
            most = now
            with open(os.path.join(sys.argv[1], "most"), "w") as file:
                file.write(str(most))


class Files(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_HEAD(self):
        self.answer(False)

    def do_GET(self):
        count(1)
        try:
            # Long enough that those who ask at once meet.
            time.sleep(0.005)
            self.answer(True)
        finally:
            count(-1)

    def answer(self, with_body):
        try:
            file = open(os.path.join(sys.argv[1], os.path.basename(self.path)), "rb")
        except OSError:
            return self.send_error(404)
        with file:
            size = os.fstat(file.fileno()).st_size
            asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
            first, last = (int(asked[1]), min(int(asked[2] or size), size - 1)) if asked else (0, size - 1)
            self.send_response(206 if asked else 200)
            self.send_header("Accept-Ranges", "bytes")
            self.send_header("Content-Length", str(last + 1 - first))
            if asked:
                self.send_header("Content-Range", f"bytes {first}-{last}/{size}")
            self.end_headers()
            if with_body:
                self.wfile.write(os.pread(file.fileno(), last + 1 - first, first))


server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Files)
if len(sys.argv) > 2:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*sys.argv[2:])
    server.socket = context.wrap_socket(server.socket, server_side=True)
print(server.server_port, flush=True)
server.serve_forever()
