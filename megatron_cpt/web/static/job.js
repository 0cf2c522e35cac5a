import {ask, find, keepLooking, logView, say} from "./common.js";

const {job} = find("main").dataset;
const output = logView(find("#text"), (offset) => ask(`/api/jobs/${job}?offset=${offset}`));

const look = keepLooking(async () => {
  const found = await output.look();
  const running = found.state === "running";
  const state = find("#state");
  state.textContent = found.state;
  state.className = `state ${found.state}`;
  find("#exit").textContent = found.exit_code === null ? "" : `exit code ${found.exit_code}`;
  find("#stop").disabled = find("#kill").disabled = !running;
  const link = find("#run");
  link.hidden = !found.run;
  if (found.run) link.href = `/runs/${found.run}`;
}, 1000);

for (const [id, hard] of [["stop", false], ["kill", true]]) {
  find(`#${id}`).addEventListener("click", async () => {
    try {
      await ask(`/api/jobs/${job}/stop`, {hard});
      look();
    } catch (error) {
      say(error.message);
    }
  });
}
