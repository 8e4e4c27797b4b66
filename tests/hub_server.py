"""A Hub on the loopback interface: as much of its protocol as huggingface_hub needs to create, upload and download."""

import base64
import contextlib
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

TOKEN = "hf_LoopbackTokenOfTheTests0123456789"


class Hub:
    """The server's state. Faults: ``die_at`` names the kind of request at which connections begin to break."""

    def __init__(self):
        self.repos = {}  # name -> {"private": bool, "branches": {name: {path: bytes}}}
        self.blobs = {}  # sha256 -> bytes, uploaded but maybe in no commit yet
        self.requests = []  # (method, path, headers)
        self.commits = []  # (repo, branch, message, paths)
        self.die_at = None
        self.status_at = {}  # kind of request -> HTTP status to answer with

    def files(self, repo, branch="main"):
        return self.repos[repo]["branches"][branch]


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    ROUTES = (
        ("POST", r"/api/repos/create", "create"),
        ("POST", r"/api/validate-yaml", "validate"),
        ("GET", r"/api/whoami-v2", "whoami"),
        ("POST", r"/api/models/(?P<repo>[^/]+/[^/]+)/preupload/(?P<branch>[^/]+)", "preupload"),
        ("POST", r"/api/models/(?P<repo>[^/]+/[^/]+)/commit/(?P<branch>[^/]+)", "commit"),
        ("POST", r"/api/models/(?P<repo>[^/]+/[^/]+)/branch/(?P<branch>[^/]+)", "make_branch"),
        ("GET", r"/api/models/(?P<repo>[^/]+/[^/]+)/tree/(?P<branch>[^/]+)", "tree"),
        ("GET", r"/api/models/(?P<repo>[^/]+/[^/]+)(?:/revision/(?P<branch>[^/]+))?", "info"),
        ("POST", r"/(?P<repo>[^/]+/[^/]+)\.git/info/lfs/objects/batch", "lfs_batch"),
        ("PUT", r"/lfs/(?P<oid>[0-9a-f]+)", "lfs_put"),
        ("GET", r"/(?P<repo>[^/]+/[^/]+)/resolve/(?P<branch>[^/]+)/(?P<path>.+)", "resolve"),
        ("HEAD", r"/(?P<repo>[^/]+/[^/]+)/resolve/(?P<branch>[^/]+)/(?P<path>.+)", "resolve"),
    )

    def handle_any(self):
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = urlsplit(self.path)
        self.query = parse_qs(parts.query)
        self.hub.requests.append((self.command, self.path, dict(self.headers)))
        for method, pattern, name in self.ROUTES:  # noqa: B007
            match = re.fullmatch(pattern, unquote(parts.path))
            if match and method == self.command:
                break
        else:
            return self.answer(404, {"error": f"no route {self.command} {parts.path}"})
        if self.hub.die_at == name:
            self.close_connection = True
            return self.connection.close()
        if name in self.hub.status_at:
            return self.answer(self.hub.status_at[name], {"error": "as the test wants it"})
        if name != "lfs_put" and self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self.answer(401, {"error": "Invalid username or password."})
        values = {key: value for key, value in match.groupdict().items() if value is not None}
        if "repo" in values and values["repo"] not in self.hub.repos:
            return self.answer(404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
        branch = values.get("branch", "main")
        if name != "make_branch" and "repo" in values and self.branch(values["repo"], branch) is None:
            return self.answer(404, {"error": "no such branch"}, {"X-Error-Code": "RevisionNotFound"})
        return getattr(self, name)(**values)

    do_GET = do_POST = do_PUT = do_HEAD = handle_any  # noqa: N815

    def branch(self, repo, name):
        branches = self.hub.repos[repo]["branches"]
        return next((b for b in branches if name in (b, self.sha(repo, b))), None)

    def sha(self, repo, branch):
        files = sorted(self.hub.files(repo, branch).items())
        return hashlib.sha1(repr([(path, git_id(content)) for path, content in files]).encode()).hexdigest()

    def create(self):
        wanted = json.loads(self.body)
        name = f"{wanted.get('organization') or 'tester'}/{wanted['name']}"
        if name.startswith("forbidden/"):
            return self.answer(403, {"error": "You don't have the rights to create a model under this namespace"})
        if name in self.hub.repos:
            return self.answer(409, {"error": "You already created this model repo", "url": f"{self.url()}/{name}"})
        private = wanted.get("visibility") == "private" or bool(wanted.get("private"))
        self.hub.repos[name] = {"private": private, "branches": {"main": {".gitattributes": b"*"}}}
        return self.answer(200, {"url": f"{self.url()}/{name}", "name": name})

    def validate(self):
        text = json.loads(self.body)["content"]
        bad = not re.match(r"---\n.*?\n---\n", text, re.DOTALL)
        problems = [{"message": "no metadata"}] if bad else []
        self.answer(400 if bad else 200, {"errors": problems, "warnings": []})

    def whoami(self):
        self.answer(200, {"name": "tester", "type": "user", "orgs": []})

    def preupload(self, repo, branch):
        files = []
        for wanted in json.loads(self.body)["files"]:
            large = wanted["path"].endswith((".safetensors", ".pt"))
            mode = "lfs" if large else "regular"
            files.append({"path": wanted["path"], "uploadMode": mode, "shouldIgnore": False})
        self.answer(200, {"files": files})

    def lfs_batch(self, repo):
        objects = []
        for wanted in json.loads(self.body)["objects"]:
            upload = {"upload": {"href": f"{self.url()}/lfs/{wanted['oid']}", "header": {}}}
            objects.append({**wanted, **({} if wanted["oid"] in self.hub.blobs else {"actions": upload})})
        self.answer(200, {"transfer": "basic", "objects": objects})

    def lfs_put(self, oid):
        if hashlib.sha256(self.body).hexdigest() != oid:
            return self.answer(400, {"error": "hash"})
        self.hub.blobs[oid] = self.body
        return self.answer(200, {})

    def commit(self, repo, branch):
        lines = [json.loads(line) for line in self.body.splitlines()]
        header = next(line["value"] for line in lines if line["key"] == "header")
        new = dict(self.hub.files(repo, branch))
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                new[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                new[value["path"]] = self.hub.blobs[value["oid"]]
        self.hub.repos[repo]["branches"][branch] = new
        paths = sorted(line["value"]["path"] for line in lines if line["key"] != "header")
        self.hub.commits.append((repo, branch, header["summary"], paths))
        sha = self.sha(repo, branch)
        self.answer(200, {"commitUrl": f"{self.url()}/{repo}/commit/{sha}", "commitOid": sha, "success": True})

    def make_branch(self, repo, branch):
        branches = self.hub.repos[repo]["branches"]
        if branch in branches:
            return self.answer(409, {"error": "Reference already exists"})
        branches[branch] = dict(branches["main"])
        return self.answer(200, {})

    def info(self, repo, branch="main"):
        name = self.branch(repo, branch)
        siblings = [{"rfilename": path} for path in sorted(self.hub.files(repo, name))]
        private = self.hub.repos[repo]["private"]
        sha = self.sha(repo, name)
        self.answer(
            200, {"id": repo, "modelId": repo, "sha": sha, "private": private, "siblings": siblings, "tags": []}
        )

    def tree(self, repo, branch):
        files = self.hub.files(repo, self.branch(repo, branch))
        self.answer(
            200, [{"type": "file", "path": p, "size": len(c), "oid": git_id(c)} for p, c in sorted(files.items())]
        )

    def resolve(self, repo, branch, path):
        name = self.branch(repo, branch)
        content = self.hub.files(repo, name).get(path)
        if content is None:
            return self.answer(404, {"error": "Entry not found"}, {"X-Error-Code": "EntryNotFound"})
        headers = {"X-Repo-Commit": self.sha(repo, name), "ETag": f'"{git_id(content)}"'}
        return self.answer(200, content, headers)

    def answer(self, status, content, headers=None):
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        if status >= 400 and isinstance(content, dict):
            headers = {"X-Error-Message": str(content.get("error", "")), **(headers or {})}
        self.send_response(status)
        self.send_header(
            "Content-Type", "application/octet-stream" if isinstance(content, bytes) else "application/json"
        )
        self.send_header("Content-Length", str(len(data)))
        for key, value in (headers or {}).items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def url(self):
        return f"http://127.0.0.1:{self.server.server_port}"

    def log_message(self, *args):
        pass


def git_id(content):
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class HubServer:
    """``with HubServer() as server``: a Hub of its own at ``server.url``, its state in ``server.hub``."""

    def __enter__(self):
        self.hub = Hub()
        handler = type("BoundHandler", (Handler,), {"hub": self.hub})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,))
        self._thread.start()
        return self

    def __exit__(self, *exception):
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


if __name__ == "__main__":  # a Hub to try `hf-sai publish` on
    with HubServer() as server:
        print(f"export HF_ENDPOINT={server.url} HF_TOKEN={TOKEN} HF_HUB_DISABLE_XET=1")
        print("What you publish to tester/NAME is kept until this ends.", flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            threading.Event().wait()
