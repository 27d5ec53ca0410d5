// SPDX-License-Identifier: Apache-2.0
//
// fake_hub [--token TOKEN] ORGANISATION/NAME=DIRECTORY...
//
// Serves these directories as a Hugging Face hub would (hub.h), until it is killed. Its first line
// on stdout is its address, for HF_ENDPOINT; it logs each request on stderr, without the token.
#include "hub.h"

#include <csignal>
#include <iostream>

int main(int count, char** words) {
    std::map<std::string, std::filesystem::path> models;
    std::string token;
    for (int i = 1; i < count; i++) {
        const std::string word = words[i];
        const size_t equals = word.find('=');
        if (word == "--token" && i + 1 < count) {
            token = words[++i];
        } else if (equals != std::string::npos && word.find('/') < equals &&
                   std::filesystem::is_directory(word.substr(equals + 1))) {
            models[word.substr(0, equals)] = word.substr(equals + 1);
        } else {
            std::cerr << "fake_hub: " << word << " is not ORGANISATION/NAME=DIRECTORY\n";
            return 2;
        }
    }
    if (models.empty()) {
        std::cerr << "fake_hub [--token TOKEN] ORGANISATION/NAME=DIRECTORY...\n";
        return 2;
    }
    sigset_t ends;  // blocked first: threads inherit the mask
    sigemptyset(&ends);
    for (const int s : {SIGINT, SIGTERM}) sigaddset(&ends, s);
    pthread_sigmask(SIG_BLOCK, &ends, nullptr);
    Hub hub(models, token, [](const Hub::Request& r) {
        std::cerr << r.server + " " + r.method + " " + r.path +
                         (r.range.empty() ? "" : " " + r.range) +
                         (r.authorized ? " with a token\n" : "\n");
    });
    std::cout << hub.address() << std::endl;
    int which;
    sigwait(&ends, &which);
}
