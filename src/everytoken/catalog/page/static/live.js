// Votes and notes of this browser, kept by the server. No cookie: a random name in this browser's storage.
"use strict";
(function () {
  const zone = document.getElementById("zone");
  if (zone) zone.value = Intl.DateTimeFormat().resolvedOptions().timeZone || "UTC";
  const yours = document.getElementById("yours");
  if (!yours) return;
  const slug = document.querySelector("article").dataset.slug;
  const vote = document.getElementById("vote");
  const note = document.getElementById("note");
  const said = document.getElementById("said");
  let profile = localStorage.getItem("everytoken-profile");
  if (!profile) {
    profile = Array.from(crypto.getRandomValues(new Uint8Array(16)), (n) => n.toString(16).padStart(2, "0")).join("");
    localStorage.setItem("everytoken-profile", profile);
  }

  async function ask(body) {
    const answer = await fetch("../api/mine", {
      method: "POST", headers: { "content-type": "application/json" },
      body: JSON.stringify({ profile, slug, ...body }),
    });
    if (!answer.ok) throw new Error(String(answer.status));
    return answer.json();
  }

  function paint(mine) {
    vote.setAttribute("aria-pressed", String(mine.vote));
    vote.textContent = mine.vote ? "Upvoted" : "Upvote";
    yours.hidden = false;
  }

  function failed() { said.textContent = "The server did not take it."; }

  ask({}).then((mine) => { note.value = mine.note; paint(mine); }).catch(() => {});
  vote.addEventListener("click", () => {
    ask({ vote: vote.getAttribute("aria-pressed") !== "true" }).then(paint).catch(failed);
  });
  document.getElementById("keep").addEventListener("click", () => {
    ask({ note: note.value }).then((mine) => { paint(mine); said.textContent = "Kept."; }).catch(failed);
  });
})();
