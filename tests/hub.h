// SPDX-License-Identifier: Apache-2.0
//
// hub.h: a fake Hugging Face hub on loopback, with the part of its protocol that a download uses.
//
//     Hub hub({{"org/name", directory}}, "token");        hub.address() -> http://127.0.0.1:PORT
//
// It is two servers. The hub requires the token and answers with X-Repo-Commit and ETag, or with an
// error's X-Error-Code. It redirects a large file to the CDN, which refuses a request that has an
// Authorization header. The ETag of a large file is its sha256, that of a small one its git blob
// hash; a revision's commit is a hash of them all. A test sets faults through change().
#pragma once

#include <condition_variable>
#include <cstdio>
#include <filesystem>
#include <fstream>
#include <functional>
#include <map>
#include <mutex>
#include <stdexcept>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include <httplib.h>
#include <nlohmann/json.hpp>
#include <openssl/evp.h>

class Hub {
  public:
    struct Request {
        std::string server, method, path, range;  // "hub" or "cdn"
        bool authorized;                          // it had an Authorization header
    };
    struct Refusal {
        int status = 0;
        std::string code, message, retry_after = "";  // X-Error-Code, X-Error-Message, Retry-After
        int times = 1 << 30;
    };
    struct Faults {
        Refusal hub, cdn;
        std::vector<size_t> breaks;  // hang up at this byte of a file; each happens once
        size_t hold = 0;             // wait at this byte of a file; 0: no wait
        int age = 0;                 // of CDN addresses; the CDN refuses addresses of another age
        bool plain = false;          // like a mirror: no CDN, no X-Linked headers
        bool ignore_ranges = false;  // the CDN sends the whole file instead
        std::string wrong;           // the name of a file whose first byte is sent wrong
        std::map<std::string, std::string> moved;      // old name -> new name
        std::map<std::string, std::string> revisions;  // further revision -> commit
    };

    Hub(std::map<std::string, std::filesystem::path> directories, std::string secret,
        std::function<void(const Request&)> on_request = nullptr)
        : models(std::move(directories)), token(std::move(secret)), report(std::move(on_request)) {
        start(hub, hub_port, hub_thread, &Hub::answer);
        start(cdn, cdn_port, cdn_thread, &Hub::answer_blob);
    }
    ~Hub() {
        change([](Faults& f) { f.hold = 0; });
        hub.stop(), cdn.stop();
        hub_thread.join(), cdn_thread.join();
    }
    Hub(const Hub&) = delete;

    std::string address() const { return "http://127.0.0.1:" + std::to_string(hub_port); }

    void change(const std::function<void(Faults&)>& how) {
        const std::lock_guard lock(mutex);
        how(faults);
        changed.notify_all();
    }
    std::vector<Request> requests() {  // since the previous call
        const std::lock_guard lock(mutex);
        return std::exchange(seen, {});
    }
    bool wait_for_hold() {  // until an answer waits at `hold`
        std::unique_lock lock(mutex);
        return changed.wait_for(lock, std::chrono::seconds(100), [&] { return holding > 0; });
    }

    std::string commit(const std::string& model) {
        std::map<std::string, std::string> names;
        for (const auto& entry : std::filesystem::directory_iterator(models.at(model)))
            if (entry.is_regular_file()) names[entry.path().filename()] = etag(entry.path());
        std::string list;
        for (const auto& [name, hash] : names) list += name + " " + hash + "\n";
        return digest(EVP_sha1(), list, "");
    }
    static bool is_large(const std::filesystem::path& file) {
        return file.extension() == ".safetensors" || file.extension() == ".model" ||
               file.filename() == "tokenizer.json";
    }
    std::string etag(const std::filesystem::path& file) {
        const auto size = std::filesystem::file_size(file);
        const auto key = std::tuple(file, size, std::filesystem::last_write_time(file));
        const std::lock_guard lock(hashing);
        std::string& hash = hashes[key];
        if (hash.empty()) {
            const std::string header = "blob " + std::to_string(size) + '\0';
            hash =
                is_large(file) ? digest(EVP_sha256(), "", file) : digest(EVP_sha1(), header, file);
        }
        return hash;
    }

  private:
    using In = httplib::Request;
    using Out = httplib::Response;

    void start(httplib::Server& server, int& port, std::thread& thread,
               void (Hub::*handler)(const In&, Out&)) {
        server.Get(".*", [this, handler](const In& in, Out& out) { (this->*handler)(in, out); });
        server.set_keep_alive_max_count(1);
        port = server.bind_to_any_port("127.0.0.1");
        if (port <= 0) throw std::runtime_error("no free port on 127.0.0.1");
        thread = std::thread([&server] { server.listen_after_bind(); });
        while (!server.is_running()) std::this_thread::yield();  // stop() before that does nothing
    }

    // The hash of a text followed by a file's content (if there is a file), in hexadecimal.
    static std::string digest(const EVP_MD* kind, const std::string& first,
                              const std::filesystem::path& file) {
        EVP_MD_CTX* context = EVP_MD_CTX_new();
        EVP_DigestInit_ex(context, kind, nullptr);
        EVP_DigestUpdate(context, first.data(), first.size());
        if (std::ifstream in(file, std::ios::binary); !file.empty()) {
            std::vector<char> buffer(1 << 20);
            while (in.read(buffer.data(), std::streamsize(buffer.size())), in.gcount() > 0)
                EVP_DigestUpdate(context, buffer.data(), size_t(in.gcount()));
        }
        unsigned char bytes[EVP_MAX_MD_SIZE];
        unsigned size = 0;
        EVP_DigestFinal_ex(context, bytes, &size);
        EVP_MD_CTX_free(context);
        std::string hex;
        for (unsigned i = 0; i < size; i++) {
            hex += "0123456789abcdef"[bytes[i] >> 4];
            hex += "0123456789abcdef"[bytes[i] & 15];
        }
        return hex;
    }

    void note(const char* server, const In& in) {
        const Request request{server, in.method, in.target, in.get_header_value("Range"),
                              in.has_header("Authorization")};
        const std::lock_guard lock(mutex);
        seen.push_back(request);
        if (report) report(request);
    }

    static void refuse(Out& out, const Refusal& why) {
        out.status = why.status;
        if (!why.code.empty()) out.set_header("X-Error-Code", why.code);
        if (!why.message.empty()) out.set_header("X-Error-Message", why.message);
        if (!why.retry_after.empty()) out.set_header("Retry-After", why.retry_after);
        out.set_content(why.message + "\n", "text/plain");
    }
    bool refused(Out& out, Refusal Faults::*by) {  // by a fault that a test has set
        const std::lock_guard lock(mutex);
        Refusal& refusal = faults.*by;
        if (refusal.status == 0 || refusal.times <= 0) return false;
        refusal.times--;
        refuse(out, refusal);
        return true;
    }

    // Paths: /ORG/NAME/resolve/REVISION/FILE, /api/models/ORG/NAME/{revision,tree}/REVISION, and
    // /api/resolve-cache/models/ORG/NAME/REVISION/FILE, to which a small file is redirected.
    void answer(const In& in, Out& out) {
        note("hub", in);
        if (refused(out, &Faults::hub)) return;
        std::vector<std::string> words{""};  // of the undecoded path: %2F is no separator
        for (const char c : in.target.substr(1, in.target.find('?') - 1)) {
            if (c == '/')
                words.emplace_back();
            else
                words.back() += c;
        }
        const bool api = words[0] == "api", cache = api && words.size() == 7;
        if (api) words.erase(words.begin(), words.begin() + (cache ? 3 : 2));
        if (cache) words.insert(words.begin() + 2, "resolve");
        if (words.size() < (api && !cache ? 4 : 5))
            return refuse(out, {404, "", "Sorry, we can't find the page you are looking for."});

        const std::string name = words[0] + "/" + words[1];
        Faults now;
        {
            const std::lock_guard lock(mutex);
            now = faults;
        }
        if (now.moved.count(name) && !api) {
            out.set_header("Location",
                           "/" + now.moved[name] + "/resolve/" + words[3] + "/" + words[4]);
            out.status = 307;
            return;
        }
        const std::string given = in.get_header_value("Authorization");
        if (!given.empty() && given != "Bearer " + token)
            return refuse(out, {401, "", "Invalid credentials in Authorization header"});
        if (!models.count(name))
            return refuse(out, {given.empty() ? 401 : 404, "RepoNotFound", "Repository not found"});
        if (given.empty() && !token.empty())
            return refuse(out, {401, "GatedRepo",
                                "Access to model " + name +
                                    " is restricted. You must have access to it and be "
                                    "authenticated to access it. Please log in."});

        std::string revision = words[3], sha = commit(name);
        for (size_t at; (at = revision.find("%2F")) != std::string::npos;)
            revision.replace(at, 3, "/");
        if (now.revisions.count(revision))
            sha = now.revisions[revision];
        else if (revision != "main" && revision != sha)
            return refuse(out, {404, "RevisionNotFound", "Invalid rev id: " + revision});
        if (api && !cache) return list(name, sha, words[2] == "tree", out);

        const std::filesystem::path file = models[name] / words[4];
        out.set_header("X-Repo-Commit", sha);
        if (!std::filesystem::is_regular_file(file))
            return refuse(out, {404, "EntryNotFound", "Entry not found"});
        const std::string hash = etag(file);
        const bool here = cache || now.plain;
        out.set_header(here ? "ETag" : "X-Linked-ETag", "\"" + hash + "\"");
        if (here) return send(file, out);
        out.set_header("X-Linked-Size", std::to_string(std::filesystem::file_size(file)));
        if (is_large(file)) {
            const std::string cdn_address = "http://127.0.0.1:" + std::to_string(cdn_port);
            out.set_header("Location", cdn_address + "/" + name + "/" + words[4] +
                                           "?signature=" + hash + std::to_string(now.age));
            out.status = 302;
        } else {
            out.set_header("Location",
                           "/api/resolve-cache/models/" + name + "/" + sha + "/" + words[4]);
            out.status = 307;
        }
    }

    // The list of a revision's files, which Hugging Face's own client asks for before it downloads.
    void list(const std::string& name, const std::string& sha, bool tree, Out& out) {
        using json = nlohmann::json;
        json siblings = json::array(), files = json::array();
        for (const auto& entry : std::filesystem::directory_iterator(models.at(name))) {
            if (!entry.is_regular_file()) continue;
            const std::string file = entry.path().filename(), hash = etag(entry.path());
            json item{{"type", "file"}, {"path", file}, {"size", entry.file_size()}, {"oid", hash}};
            if (is_large(entry.path()))
                item["lfs"] = {{"oid", hash}, {"size", entry.file_size()}, {"pointerSize", 130}};
            files.push_back(item);
            siblings.push_back({{"rfilename", file}});
        }
        const json model{{"id", name}, {"sha", sha}, {"private", false}, {"siblings", siblings}};
        out.set_content((tree ? files : model).dump(), "application/json");
    }

    void answer_blob(const In& in, Out& out) {
        note("cdn", in);
        if (in.has_header("Authorization"))
            return refuse(out, {400, "", "the CDN is not to be told the token"});
        if (refused(out, &Faults::cdn)) return;
        const size_t slash = in.path.rfind('/');
        const auto model = models.find(in.path.substr(1, slash ? slash - 1 : 0));
        if (model == models.end()) return refuse(out, {404, "", "no such blob"});
        const std::filesystem::path file = model->second / in.path.substr(slash + 1);
        if (!std::filesystem::is_regular_file(file)) return refuse(out, {404, "", "no such blob"});
        {
            const std::lock_guard lock(mutex);
            if (in.get_param_value("signature") != etag(file) + std::to_string(faults.age))
                return refuse(out, {403, "", "expired"});
            // httplib itself cuts the answer to the request's ranges; without them it sends the
            // whole.
            if (faults.ignore_ranges) const_cast<In&>(in).ranges.clear();
        }
        send(file, out);
    }

    void send(const std::filesystem::path& file, Out& out) {
        auto in = std::make_shared<std::ifstream>(file, std::ios::binary);
        out.set_content_provider(
            std::filesystem::file_size(file), "application/octet-stream",
            [this, in, name = file.filename()](size_t offset, size_t length,
                                               httplib::DataSink& sink) {
                std::string bytes(std::min<size_t>(length, 1 << 16), '\0');
                in->clear();
                in->seekg(std::streamoff(offset)).read(bytes.data(), std::streamsize(bytes.size()));
                const bool hang_up = fail(name, offset, bytes);
                return sink.write(bytes.data(), bytes.size()) && !hang_up;
            });
    }

    // Applies the faults to the bytes of a file at this offset. Returns whether to hang up after
    // sending them.
    bool fail(const std::string& file, size_t offset, std::string& bytes) {
        std::unique_lock lock(mutex);
        if (file == faults.wrong && offset == 0) bytes[0] = char(bytes[0] ^ 1);
        if (faults.hold && offset == faults.hold) {
            holding++;
            changed.notify_all();
            changed.wait(lock, [&] { return faults.hold != offset; });
            holding--;
        }
        if (offset < faults.hold && faults.hold < offset + bytes.size())
            bytes.resize(faults.hold - offset);
        for (auto at = faults.breaks.begin(); at != faults.breaks.end(); ++at)
            if (offset <= *at && *at < offset + bytes.size()) {
                bytes.resize(*at - offset);
                faults.breaks.erase(at);
                return true;
            }
        return false;
    }

    std::map<std::string, std::filesystem::path> models;
    const std::string token;
    const std::function<void(const Request&)> report;
    std::mutex mutex;                 // guards changed, faults, seen, holding
    std::condition_variable changed;  // faults or holding have changed
    Faults faults;
    std::vector<Request> seen;
    int holding = 0;  // answers that wait at Faults::hold
    std::mutex hashing;
    std::map<std::tuple<std::filesystem::path, std::uintmax_t, std::filesystem::file_time_type>,
             std::string>
        hashes;
    httplib::Server hub, cdn;
    int hub_port = 0, cdn_port = 0;
    std::thread hub_thread, cdn_thread;
};
