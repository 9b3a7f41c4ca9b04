// Streams the microphone or a file to the server at 16 kHz, and shows text, latency and a spectrogram.
"use strict";
const RATE = 16000;
const at = (id) => document.getElementById(id);
let running = null;

function status(text, failed = false) {
  at("status").textContent = text;
  at("status").classList.toggle("error", failed);
}

function clock(seconds) {
  return `${Math.floor(seconds / 60)}:${(seconds % 60).toFixed(2).padStart(5, "0")}`;
}

function connect() {
  const address = new URL("stream", location.href);
  address.protocol = location.protocol === "https:" ? "wss:" : "ws:";
  address.search = new URLSearchParams({ rate: RATE, token: new URLSearchParams(location.search).get("token") ?? "" });
  return new Promise((resolve, reject) => {
    const socket = new WebSocket(address);
    socket.binaryType = "arraybuffer";
    socket.onopen = () => resolve(socket);
    socket.onerror = () => reject(new Error("the server refuses the connection: a wrong token, or all places are taken"));
  });
}

function show(message) {
  if (message.type === "ready") {
    at("delay").textContent = `${message.delay_ms} ms (chunk ${message.chunk}, left ${message.left})`;
  } else if (message.type === "partial") {
    at("stable").textContent = message.stable;
    at("open").textContent = message.text.slice(message.stable.length);
    at("latency").textContent = `${message.latency_ms.toFixed(0)} ms`;
    at("seconds").textContent = clock(message.seconds);
  } else if (message.type === "final") {
    const row = at("finals").insertRow(0);
    const words = message.words;
    for (const text of [clock(words[0].start), clock(words[words.length - 1].end), message.text]) {
      row.insertCell().textContent = text;
    }
  } else if (message.type === "error") {
    status(message.error, true);
    stop(false);
  } else if (message.type === "done") {
    status("finished");
  }
}

function draw(analyser) {
  const canvas = at("spectrogram");
  const picture = canvas.getContext("2d");
  const bins = new Uint8Array(analyser.frequencyBinCount);
  const step = () => {
    if (!running || running.analyser !== analyser) return;
    analyser.getByteFrequencyData(bins);
    picture.drawImage(canvas, -2, 0);
    for (let y = 0; y < canvas.height; y++) {
      const value = bins[Math.floor(((canvas.height - 1 - y) / canvas.height) * bins.length)] / 255;
      picture.fillStyle = `hsl(${260 - 220 * value} 90% ${5 + 65 * value}%)`;
      picture.fillRect(canvas.width - 2, y, 2, 1);
    }
    requestAnimationFrame(step);
  };
  requestAnimationFrame(step);
}

// open: makes the node to stream of an AudioContext, with functions that begin and close it; heard: also play it.
async function start(open, heard) {
  await stop(false);
  for (const id of ["stable", "open", "latency", "seconds"]) at(id).textContent = "";
  at("finals").replaceChildren();
  at("spectrogram").getContext("2d").clearRect(0, 0, at("spectrogram").width, at("spectrogram").height);
  const context = new AudioContext({ sampleRate: RATE });
  let socket = null;
  try {
    await context.audioWorklet.addModule("microphone.js");
    const source = await open(context);
    socket = await connect();
    socket.onmessage = (event) => show(JSON.parse(event.data));
    socket.onclose = () => { if (running && running.socket === socket) stop(false); };
    const pcm = new AudioWorkletNode(context, "pcm", { numberOfOutputs: 0 });
    pcm.port.onmessage = (event) => { if (socket.readyState === WebSocket.OPEN) socket.send(event.data); };
    const analyser = new AnalyserNode(context, { fftSize: 512, smoothingTimeConstant: 0, minDecibels: -100 });
    source.node.connect(pcm);
    source.node.connect(analyser);
    if (heard) source.node.connect(context.destination);
    running = { context, socket, analyser, close: source.close };
    source.begin();
    at("stop").disabled = false;
    status(heard ? "playing and recognising the file" : "listening");
    draw(analyser);
  } catch (error) {
    if (socket) socket.close();
    await context.close();
    status(error.message, true);
  }
}

async function stop(finish = true) {
  if (!running) return;
  const { context, socket, close } = running;
  running = null;
  at("stop").disabled = true;
  close();
  await context.close();
  if (finish && socket.readyState === WebSocket.OPEN) {
    status("finishing");
    socket.send(JSON.stringify({ type: "finish" }));
  } else {
    socket.close();
  }
}

async function microphone(context) {
  if (!navigator.mediaDevices) throw new Error("a browser gives its microphone to localhost and https pages only");
  const stream = await navigator.mediaDevices.getUserMedia({ audio: { channelCount: 1 } });
  const node = context.createMediaStreamSource(stream);
  return { node, begin: () => {}, close: () => stream.getTracks().forEach((track) => track.stop()) };
}

function fromFile(file) {
  return async (context) => {
    let buffer;
    try {
      buffer = await context.decodeAudioData(await file.arrayBuffer());
    } catch {
      throw new Error(`${file.name} is not an audio file that this browser can decode`);
    }
    const node = new AudioBufferSourceNode(context, { buffer });
    node.onended = () => { if (running && running.context === context) stop(); };
    return { node, begin: () => node.start(), close: () => {} };
  };
}

at("microphone").onclick = () => start(microphone, false);
at("stop").onclick = () => stop();
at("file").onchange = (event) => {
  const [file] = event.target.files;
  event.target.value = "";
  if (file) start(fromFile(file), true);
};
for (const name of ["dragover", "dragleave", "drop"]) {
  document.addEventListener(name, (event) => {
    event.preventDefault();
    at("drop").classList.toggle("dragging", name === "dragover");
    if (name === "drop" && event.dataTransfer.files.length) start(fromFile(event.dataTransfer.files[0]), true);
  });
}
