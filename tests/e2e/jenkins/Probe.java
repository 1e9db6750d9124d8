import java.net.InetAddress;
import java.net.ServerSocket;
import java.net.Socket;
import java.nio.file.Files;
import java.nio.file.Path;
import java.util.stream.LongStream;

/** What Jenkins needs of Java and the system, and a sandbox could forbid: it says "ok" where all of it works. */
class Probe {
    public static void main(String[] arguments) throws Exception {
        // Long enough to be compiled, on several threads.
        LongStream.range(0, 20_000_000).parallel().map(n -> n * n % 7).sum();
        try (var server = new ServerSocket(0, 1, InetAddress.getLoopbackAddress());
                var client = new Socket(server.getInetAddress(), server.getLocalPort())) {
            client.getOutputStream().write(1);
            if (server.accept().getInputStream().read() != 1) {
                throw new IllegalStateException("a socket does not say what it is told");
            }
        }
        Files.writeString(Files.createTempFile(Path.of(System.getenv("JENKINS_HOME")), "probe", ""), "a file of its own");
        // As a build does, which also compiles the model.
        var script = "set -e; cd \"$(mktemp -d)\"; git --version; make --version; python3 -m venv venv;"
                + " echo 'int main(void) { return 0; }' >a.c; cc -o a a.c; ./a; nproc; cat /proc/meminfo";
        var child = new ProcessBuilder("sh", "-c", script).inheritIO().redirectOutput(ProcessBuilder.Redirect.DISCARD).start();
        System.out.println(child.waitFor() == 0 ? "ok" : "a build could not work here");
    }
}
