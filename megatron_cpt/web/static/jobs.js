import {ask, element, fillTable, find, keepLooking} from "./common.js";

keepLooking(async () => {
  const jobs = await ask("/api/jobs");
  find("#empty").hidden = jobs.length > 0;
  find("#jobs").hidden = jobs.length === 0;
  fillTable(find("#jobs tbody"), jobs.map((job) => ({
    key: job.id, content: JSON.stringify(job), cells: () => [
      element("td", {class: "path"}, element("a", {href: `/jobs/${job.id}`}, job.title || job.id)),
      element("td", {}, job.kind), element("td", {}, element("span", {class: `state ${job.state}`}, job.state)),
      element("td", {}, new Date(job.created).toLocaleString()), element("td", {class: "path"}, element("code", {}, job.command)),
    ],
  })));
});
