// Node's own http2 (nghttp2 underneath) as an HBONE peer. Configuration is one JSON argument; commands are JSON lines
// on stdin; events are JSON lines on stdout. No npm packages.
//
// server: {role, cert, key, roots, allow: [SPIFFE ids] | null}   -> {event: "listening", port}
//   commands: {do: "goaway"}  every session: GOAWAY(NO_ERROR), live streams go on
// client: {role, cert, key, roots, port, expect}                 -> {event: "connected"}
//   commands: {do: "tunnel", id, target, upload, half_close}  `upload` is a file or null
//             {do: "end", id} | {do: "reset", id} | {do: "goaway"} | {do: "close"}
'use strict';
const crypto = require('crypto');
const fs = require('fs');
const http2 = require('http2');
const net = require('net');
const readline = require('readline');

const config = JSON.parse(process.argv[2]);
const say = (value) => process.stdout.write(JSON.stringify(value) + '\n');
const tls = {
  key: fs.readFileSync(config.key),
  cert: fs.readFileSync(config.cert),
  ca: fs.readFileSync(config.roots),
  minVersion: 'TLSv1.3',
  ALPNProtocols: ['h2'],
  settings: { initialWindowSize: 1 << 20, enablePush: false },
};
const identities = (socket) =>
  ((socket.getPeerCertificate() || {}).subjectaltname || '')
    .split(', ')
    .filter((name) => name.startsWith('URI:'))
    .map((name) => name.slice(4));
const commands = (table) =>
  readline.createInterface({ input: process.stdin }).on('line', (line) => {
    const command = JSON.parse(line);
    table[command.do](command);
  });
const watch = (session, name) => {
  session.on('goaway', (code, last) => say({ event: 'goaway', code, last }));
  session.on('error', (error) => say({ event: 'session-error', error: error.message }));
  session.on('close', () => say({ event: 'session-closed', name }));
};

function server() {
  const sessions = new Set();
  const listener = http2.createSecureServer({ ...tls, requestCert: true, rejectUnauthorized: true });
  listener.on('session', (session) => {
    sessions.add(session);
    session.on('close', () => sessions.delete(session));
    session.setLocalWindowSize(4 << 20);
    watch(session, 'server');
  });
  listener.on('sessionError', () => {});
  listener.on('tlsClientError', (error) => say({ event: 'tls-error', error: error.message }));
  listener.on('stream', (stream, headers) => {
    const peer = identities(stream.session.socket);
    say({ event: 'request', method: headers[':method'], authority: headers[':authority'], headers, peer });
    stream.on('error', (error) => say({ event: 'stream-error', error: error.message }));
    if (headers[':method'] !== 'CONNECT') return stream.respond({ ':status': 405 }, { endStream: true });
    if (config.allow && !peer.some((id) => config.allow.includes(id))) {
      return stream.respond({ ':status': 401 }, { endStream: true });
    }
    const colon = headers[':authority'].lastIndexOf(':');
    const upstream = net.connect({
      host: headers[':authority'].slice(0, colon).replace(/[[\]]/g, ''),
      port: Number(headers[':authority'].slice(colon + 1)),
      allowHalfOpen: true,
    });
    upstream.on('connect', () => {
      stream.respond({ ':status': 200 });
      // Node ends the readable side of a stream that was reset, too: that must not become a FIN.
      stream.pipe(upstream, { end: false });
      stream.on('end', () => {
        if (!stream.aborted && stream.rstCode === 0) upstream.end();
      });
      upstream.pipe(stream);
    });
    upstream.on('error', (error) => {
      say({ event: 'upstream-error', error: error.code });
      if (!stream.headersSent) stream.respond({ ':status': 503 }, { endStream: true });
      else stream.close(http2.constants.NGHTTP2_CONNECT_ERROR);
    });
    stream.on('close', () => {
      say({ event: 'stream-closed', code: stream.rstCode });
      // both directions are over when each was ended by its own pipe; else the application must see a reset
      if (stream.rstCode !== 0) upstream.resetAndDestroy();
    });
  });
  commands({
    goaway: () => sessions.forEach((session) => session.goaway(http2.constants.NGHTTP2_NO_ERROR)),
  });
  listener.listen(0, '127.0.0.1', () => say({ event: 'listening', port: listener.address().port }));
}

function client() {
  const session = http2.connect(`https://127.0.0.1:${config.port}`, { ...tls, checkServerIdentity: () => undefined });
  watch(session, 'client');
  session.on('connect', () => {
    session.setLocalWindowSize(4 << 20);
    const peer = identities(session.socket);
    if (config.expect && !peer.includes(config.expect)) return session.destroy(new Error(`peer is ${peer}`));
    say({ event: 'tls', version: session.socket.getProtocol(), alpn: session.alpnProtocol, peer });
  });
  session.on('remoteSettings', (settings) => say({ event: 'connected', settings }));
  const streams = new Map();
  commands({
    tunnel: ({ id, target, upload, half_close: halfClose, headers }) => {
      let stream;
      try {
        stream = session.request({ ':method': 'CONNECT', ':authority': target, ...headers });
      } catch (error) {
        return say({ event: 'stream-closed', id, status: null, error: error.message });
      }
      streams.set(id, stream);
      const got = crypto.createHash('sha256');
      let size = 0;
      let status = null;
      let ended = false;
      stream.on('response', (answer) => {
        status = answer[':status'];
        say({ event: 'response', id, status, headers: answer });
        if (status !== 200) return stream.end();
        if (upload) fs.createReadStream(upload).pipe(stream, { end: halfClose });
        else if (halfClose) stream.end();
      });
      stream.on('data', (chunk) => {
        got.update(chunk);
        if (size === 0) say({ event: 'first-byte', id });
        size += chunk.length;
      });
      stream.on('end', () => {
        ended = true;
        say({ event: 'end', id, size, sha: got.digest('hex') });
        if (!halfClose) stream.end();
      });
      stream.on('error', (error) => say({ event: 'stream-error', id, error: error.message }));
      stream.on('close', () => say({ event: 'stream-closed', id, status, size, ended, code: stream.rstCode }));
    },
    end: ({ id }) => streams.get(id).end(),
    reset: ({ id }) => streams.get(id).close(http2.constants.NGHTTP2_CANCEL),
    goaway: () => session.goaway(http2.constants.NGHTTP2_NO_ERROR),
    close: () => session.close(),
  });
}

({ server, client })[config.role]();
