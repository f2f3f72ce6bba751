// The theme's search finds a word of a query at the start of words, so "to" would find "token" and "torchtune". This
// script removes such small words from a query, unless nothing else is left. Words in quotation marks stay.
"use strict";
const QUERY = 2; // the theme's type of a message with a query
const SMALL_WORDS = new Set(
  ("a am an and any are at be can could did do does for from had has have how i if in into is isn't it its me my not of on or " +
    "should so that the their them then there this to too was we what when where which why will with would you your").split(" "),
);
const send = Worker.prototype.postMessage;
Worker.prototype.postMessage = function (message, ...options) {
  if (message?.type === QUERY && !message.data.includes('"')) {
    const query = message.data.replace(/weights\s+(and|&)\s+biases/i, "wandb");
    const words = query.split(/\s+/).filter((word) => !SMALL_WORDS.has(word.toLowerCase()));
    message = {...message, data: words.join(" ").trim() || message.data};
  }
  return send.call(this, message, ...options);
};
