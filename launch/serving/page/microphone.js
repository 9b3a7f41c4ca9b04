// Passes audio on as 16-bit PCM, 40 ms at a time.
class Pcm extends AudioWorkletProcessor {
  constructor() {
    super();
    this.kept = new Int16Array(640);
    this.filled = 0;
  }

  process(inputs) {
    const channels = inputs[0];
    if (!channels.length) return true;
    for (let i = 0; i < channels[0].length; i++) {
      let sum = 0;
      for (const channel of channels) sum += channel[i];
      const value = Math.round((32768 * sum) / channels.length);
      this.kept[this.filled++] = Math.max(-32768, Math.min(32767, value));
      if (this.filled === this.kept.length) {
        this.port.postMessage(this.kept.buffer.slice(0));
        this.filled = 0;
      }
    }
    return true;
  }
}
registerProcessor("pcm", Pcm);
